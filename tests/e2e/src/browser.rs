//! A headless Chromium that opens a file and tells what is wrong with how it looks. Spoken to over two pipes, as
//! DevTools does.
//!
//! Must not: know what is on the page.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// What a page is looked at on.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    pub width: u32,
    pub dark: bool,
}

/// What keeps a page from being read: too wide, cut off, over each other, out of its picture.
const PROBLEMS: &str = r"(() => {
  const problems = [], words = (e) => e.tagName + ' ' + e.textContent.trim().slice(0, 40);
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push(`the page is ${wide} wide, the screen ${innerWidth}`);
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (!box.width || e.parentElement.closest('.scroll')) continue;
    if (box.right > innerWidth + 1 || box.left < -1) problems.push(`beyond the screen: ${words(e)}`);
    // What ends in an ellipsis and tells the rest when it is pointed at is not cut off.
    const hides = getComputedStyle(e).overflowX == 'hidden' && !(e.title && getComputedStyle(e).textOverflow == 'ellipsis');
    if (hides && e.scrollWidth > e.clientWidth + 1) problems.push(`cut off: ${words(e)}`);
  }
  for (const picture of document.querySelectorAll('svg')) {
    const frame = picture.getBoundingClientRect();
    const texts = [...picture.querySelectorAll(':scope > text')];
    const boxes = texts.map((text) => text.getBoundingClientRect());
    boxes.forEach((box, at) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 2)
        problems.push(`out of its picture: ${words(texts[at])}`);
      boxes.slice(0, at).forEach((other, before) => {
        const apart = box.left >= other.right || other.left >= box.right || box.top >= other.bottom || other.top >= box.bottom;
        if (!apart) problems.push(`over each other: ${words(texts[before])}, ${words(texts[at])}`);
      });
    });
  }
  return problems;
})()";

pub struct Browser {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    profile: std::path::PathBuf,
    session: Option<String>,
    asked: u64,
    /// What it has told unasked.
    events: Vec<Value>,
}

impl Browser {
    /// `profile` is a directory of its own, and may be thrown away after.
    pub fn start(profile: &Path) -> Result<Browser> {
        // The pipes have to be descriptors 3 and 4.
        let command = "exec chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
             --disable-dev-shm-usage --disable-background-networking --remote-debugging-pipe \
             --user-data-dir=\"$0\" about:blank 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut process = Command::new("sh")
            .args(["-c", command])
            .arg(profile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start chromium; `make test-report` installs it")?;
        let (input, output) = (process.stdin.take(), process.stdout.take());
        let mut browser = Browser {
            process,
            input: input.context("no pipe")?,
            output: BufReader::new(output.context("no pipe")?),
            profile: profile.to_owned(),
            session: None,
            asked: 0,
            events: Vec::new(),
        };
        let target = browser.ask("Target.createTarget", json!({"url": "about:blank"}))?;
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.ask("Target.attachToTarget", target)?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Opens the file, keeps a picture of it, and fails if there is anything wrong with it.
    pub fn look(&mut self, file: &Path, screen: Screen, picture: &Path) -> Result<()> {
        let scheme = if screen.dark { "dark" } else { "light" };
        let media = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.ask("Emulation.setEmulatedMedia", json!({"features": media}))?;
        self.resize(screen.width, 900)?;
        self.events.clear();
        let url = format!("file://{}", file.display());
        let gone = self.ask("Page.navigate", json!({"url": url}))?;
        ensure!(gone["errorText"].is_null(), "{url}: {gone}");
        while !self
            .events
            .iter()
            .any(|event| event["method"] == "Page.loadEventFired")
        {
            let event = self.hear()?;
            self.events.push(event);
        }
        let mut problems = self.evaluate(PROBLEMS)?;
        let height = self.evaluate("document.documentElement.scrollHeight")?;
        let height = u32::try_from(height.as_u64().unwrap_or(900))?;
        self.resize(screen.width, height.clamp(200, 12_000))?;
        let shot = self.ask("Page.captureScreenshot", json!({"format": "png"}))?;
        let shot = STANDARD.decode(shot["data"].as_str().unwrap_or_default())?;
        std::fs::write(picture, shot).with_context(|| picture.display().to_string())?;
        let told = self.events.iter().filter(|event| complains(event, &url));
        let told: Vec<Value> = told.cloned().collect();
        problems.as_array_mut().context("a list")?.extend(told);
        ensure!(
            problems == json!([]),
            "{}, {screen:?}: {problems:#}",
            file.display()
        );
        Ok(())
    }

    fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let mobile = width < 600;
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
        self.ask("Emulation.setDeviceMetricsOverride", metrics)?;
        Ok(())
    }

    fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({"expression": expression, "returnByValue": true});
        let told = self.ask("Runtime.evaluate", asked)?;
        ensure!(told["exceptionDetails"].is_null(), "{told:#}");
        Ok(told["result"]["value"].clone())
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.asked += 1;
        let mut message = json!({"id": self.asked, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.input.write_all(message.to_string().as_bytes())?;
        self.input.write_all(&[0])?;
        self.input.flush()?;
        loop {
            let heard = self.hear()?;
            if heard["id"] == self.asked {
                ensure!(heard["error"].is_null(), "{method}: {heard}");
                return Ok(heard["result"].clone());
            }
            self.events.push(heard);
        }
    }

    fn hear(&mut self) -> Result<Value> {
        let mut message = Vec::new();
        self.output.read_until(0, &mut message)?;
        if message.pop() != Some(0) {
            bail!("chromium has ended; is it installed?");
        }
        Ok(serde_json::from_slice(&message)?)
    }
}

/// Whether an event tells of something that went wrong, or that was fetched beside the page.
fn complains(event: &Value, page: &str) -> bool {
    match event["method"].as_str() {
        Some("Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded") => true,
        Some("Network.requestWillBeSent") => event["params"]["request"]["url"] != page,
        _ => false,
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.session = None;
        let _ = self.ask("Browser.close", json!({}));
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}
