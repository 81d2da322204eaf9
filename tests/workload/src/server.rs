//! A server of the userland as a child process: started, waited for, watched.

use std::fs::{self, File};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::workload::Result;

/// An emulated server on a busy machine may take its time.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A request that takes longer is taken for lost; a paused guest's clock stands still.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Server {
    name: &'static str,
    child: Child,
    log: String,
}

impl Server {
    pub fn start(name: &'static str, program: &str, arguments: &[&str]) -> Result<Server> {
        let log = format!("/run/{name}.out");
        let file = File::create(&log).map_err(|error| format!("cannot create {log}: {error}"))?;
        let second = file
            .try_clone()
            .map_err(|error| format!("cannot share {log}: {error}"))?;
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/srv")
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(second)
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        Ok(Server { name, child, log })
    }

    /// An error once the server has ended.
    pub fn watch(&mut self) -> Result<()> {
        let status = match self.child.try_wait() {
            Ok(None) => return Ok(()),
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let from = said.len().saturating_sub(400);
        let said = said.get(from..).unwrap_or_default();
        Err(format!("{} ended: {status}; it said: {said}", self.name))
    }

    /// Connects to a port on loopback, as soon as the server listens there.
    pub fn connect(&mut self, port: u16) -> Result<TcpStream> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream
                        .set_nodelay(true)
                        .and_then(|()| stream.set_read_timeout(Some(REQUEST_TIMEOUT)))
                        .and_then(|()| stream.set_write_timeout(Some(REQUEST_TIMEOUT)))
                        .map_err(|error| format!("cannot set up a connection: {error}"))?;
                    return Ok(stream);
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(format!("{} does not listen: {error}", self.name));
                }
                Err(_) => self.watch()?,
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
