//! The document as a picture: a panel for each mix, in it a row for each choice of techniques with
//! a bar for its bytes and a marker for its time over each link.
//!
//! Must not: show anything that is not in the document.

use anyhow::Result;
use plotters::prelude::*;

use super::plan::{Class, Row};
use super::{Document, MixResult};
use crate::canvas::{self, BAND, Canvas, Drawn, FAINT, GRID, INK, Style};

const WIDTH: i32 = 1040;
const MARGIN: i32 = 24;
/// Where titles of rows end.
const LABELS: i32 = 204;
/// Where the bars are, and room for the figure after the longest.
const BARS: (i32, i32) = (216, 540);
/// Where the markers are.
const TIMES: (i32, i32) = (640, 1016);
const ROW: i32 = 20;
/// Title, and headings of the columns.
const PANEL_HEAD: i32 = 64;
/// Axis of times, and space to the next panel.
const PANEL_FOOT: i32 = 44;
const LEGEND: i32 = 74;

/// Of the links, in order; a fifth link begins again.
const LINKS: [RGBColor; 4] = [
    RGBColor(17, 94, 163),
    RGBColor(217, 119, 6),
    RGBColor(190, 24, 93),
    RGBColor(21, 128, 61),
];

/// Classes as the legend has them.
const CLASSES: [(&str, RGBColor); 4] = [
    ("without vmgang, or nothing on", RGBColor(176, 184, 196)),
    ("one technique, or few", RGBColor(125, 182, 217)),
    ("all but one", RGBColor(94, 177, 138)),
    ("everything", RGBColor(37, 99, 175)),
];

fn class_color(class: Class) -> RGBColor {
    let place = match class {
        Class::Relay | Class::Nothing => 0,
        Class::Alone => 1,
        Class::AllBut => 2,
        Class::Fixed | Class::Everything | Class::Default => 3,
    };
    CLASSES[place].1
}

/// The picture as SVG.
pub fn svg(document: &Document) -> Result<String> {
    let height: i32 = LEGEND + document.mixes.iter().map(panel_height).sum::<i32>();
    canvas::svg((WIDTH, height), |canvas| draw(canvas, document))
}

fn panel_height(mix: &MixResult) -> i32 {
    PANEL_HEAD + shown(mix).count() as i32 * ROW + PANEL_FOOT
}

/// Rows that were run at least somewhere.
fn shown(mix: &MixResult) -> impl Iterator<Item = &Row> {
    let was_run = |row: &Row| mix.links.iter().any(|link| link.seconds(row).is_some());
    mix.rows.iter().filter(move |row| was_run(row))
}

fn draw(canvas: &mut Canvas, document: &Document) -> Drawn {
    legend(canvas, document)?;
    let mut top = LEGEND;
    for mix in &document.mixes {
        panel(canvas, mix, top)?;
        top += panel_height(mix);
    }
    Ok(())
}

fn legend(canvas: &mut Canvas, document: &Document) -> Drawn {
    let title = "What each technique is worth: bytes sent and time taken, by mix";
    canvas.text((MARGIN, 26), title, Style::new(18, INK).bold())?;
    let mut x = MARGIN;
    for (name, color) in CLASSES {
        canvas.bar((x, 46), (x + 12, 58), color)?;
        canvas.text((x + 18, 52), name, Style::new(12, FAINT))?;
        x += 34 + (name.len() as f64 * 6.3) as i32;
    }
    let mut x = TIMES.0;
    let rates = document.mixes.first().map(|mix| mix.links.iter());
    for (place, link) in rates.into_iter().flatten().enumerate() {
        let text = link_name(&link.rate);
        canvas.dot((x + 5, 52), LINKS[place % LINKS.len()])?;
        canvas.text((x + 15, 52), &text, Style::new(12, FAINT))?;
        x += 40 + (text.len() as f64 * 6.3) as i32;
    }
    Ok(())
}

fn link_name(rate: &str) -> String {
    match rate {
        "none" => "loopback".to_owned(),
        rate => rate.replace("gbit", " Gbit/s").replace("mbit", " Mbit/s"),
    }
}

fn panel(canvas: &mut Canvas, mix: &MixResult, top: i32) -> Drawn {
    let rows: Vec<&Row> = shown(mix).collect();
    let first_row = top + PANEL_HEAD;
    let bottom = first_row + rows.len() as i32 * ROW;
    canvas.line((MARGIN, top + 4), (WIDTH - MARGIN, top + 4), GRID)?;
    canvas.text((MARGIN, top + 24), &mix.name, Style::new(16, INK).bold())?;
    let about = format!(
        "{}, {:.0} MB of stream",
        mix.title,
        mix.stream_bytes as f64 / 1e6
    );
    let after = MARGIN + 14 + (mix.name.len() as f64 * 9.6) as i32;
    canvas.text((after, top + 24), &about, Style::new(12, FAINT))?;
    let heading = "bytes on the wire, share of the stream";
    canvas.text((BARS.0, top + 50), heading, Style::new(12, FAINT))?;
    canvas.text(
        (TIMES.0, top + 50),
        "seconds (logarithmic)",
        Style::new(12, FAINT),
    )?;
    for (place, row) in rows.iter().enumerate() {
        if row.class == Class::Default {
            let y = first_row + place as i32 * ROW;
            canvas.bar((MARGIN, y), (WIDTH - MARGIN, y + ROW), BAND)?;
        }
    }
    let scale = Times::of(mix, &rows);
    for seconds in scale.ticks() {
        let x = scale.x(seconds);
        canvas.line((x, first_row), (x, bottom), GRID)?;
        let text = format!("{seconds}");
        canvas.text((x, bottom + 12), &text, Style::new(11, FAINT).centred())?;
    }
    floor_line(canvas, mix, (first_row, bottom))?;
    for (place, row) in rows.iter().enumerate() {
        let middle = first_row + place as i32 * ROW + ROW / 2;
        draw_row(canvas, mix, row, middle, &scale)?;
    }
    Ok(())
}

/// Where the bars of a set could end at best.
fn floor_line(canvas: &mut Canvas, mix: &MixResult, (top, bottom): (i32, i32)) -> Drawn {
    let Some(floor) = mix.floors.first() else {
        return Ok(());
    };
    let share = floor.bytes as f64 / mix.stream_bytes as f64;
    let x = bar_end(share);
    let color = RGBColor(185, 28, 28);
    canvas.line((x, top), (x, bottom + 4), color)?;
    let text = format!("floor ({}) {share:.4}", floor.method);
    canvas.text((x, bottom + 12), &text, Style::new(11, color))
}

fn draw_row(canvas: &mut Canvas, mix: &MixResult, row: &Row, middle: i32, scale: &Times) -> Drawn {
    let mut style = Style::new(12, INK).right();
    if row.class == Class::Default {
        style = style.bold();
    }
    canvas.text((LABELS, middle), &row.title, style)?;
    // Over different links the adaptive rows send different amounts: a bar each, thinner.
    let shares: Vec<f64> = mix
        .links
        .iter()
        .filter_map(|link| link.wire_bytes(row))
        .map(|bytes| bytes / mix.stream_bytes as f64)
        .collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
    let (from, to) = (format!("{least:.3}"), format!("{most:.3}"));
    let differs = from != to;
    let color = class_color(row.class);
    canvas.bar((BARS.0, middle - 6), (bar_end(least), middle + 6), color)?;
    if differs {
        // What it sends more over the link where it sends most.
        canvas.bar(
            (bar_end(least), middle - 3),
            (bar_end(most), middle + 3),
            color,
        )?;
    }
    let text = match differs {
        true => format!("{from} to {to}"),
        false => to,
    };
    canvas.text((bar_end(most) + 6, middle), &text, Style::new(11, INK))?;
    for (place, link) in mix.links.iter().enumerate() {
        if let Some(seconds) = link.seconds(row) {
            canvas.dot((scale.x(seconds), middle), LINKS[place % LINKS.len()])?;
        }
    }
    Ok(())
}

/// A bar of one is as long as the room for it; longer ones do not happen.
fn bar_end(share: f64) -> i32 {
    let length = f64::from(BARS.1 - BARS.0) * share.clamp(0.0, 1.05);
    BARS.0 + (length.round() as i32).max(1)
}

/// A logarithmic scale: loopback and 100 Mbit/s are far apart.
struct Times {
    least: f64,
    most: f64,
}

impl Times {
    fn of(mix: &MixResult, rows: &[&Row]) -> Self {
        let seconds: Vec<f64> = mix
            .links
            .iter()
            .flat_map(|link| rows.iter().filter_map(|row| link.seconds(row)))
            .collect();
        let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = seconds.iter().copied().fold(0.0, f64::max);
        // Room at both ends, and some length whatever was measured.
        Self {
            least: (least * 0.85).max(1e-3),
            most: (most * 1.15).max(least * 1.5).max(1e-2),
        }
    }

    fn x(&self, seconds: f64) -> i32 {
        let share = (seconds / self.least).ln() / (self.most / self.least).ln();
        TIMES.0 + (f64::from(TIMES.1 - TIMES.0) * share).round() as i32
    }

    fn ticks(&self) -> Vec<f64> {
        let decades = (-3..5).map(|power| 10_f64.powi(power));
        decades
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * decade))
            .filter(|tick| (self.least..self.most).contains(tick))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ablation::plan::DEFAULT;
    use crate::ablation::testing;

    #[test]
    fn every_row_and_mix_is_in_the_picture() {
        let mut document = testing::document(testing::mix(
            "debian",
            &[
                (Class::Relay, "plain relay", 2.0, 1_000_000),
                (Class::Default, DEFAULT, 0.5, 60_000),
            ],
        ));
        let other = testing::mix("a<b", &[(Class::Nothing, "none", 1.0, 1_000_000)]);
        document.mixes.push(other);
        let picture = svg(&document).expect("a picture");
        for text in [
            "debian",
            "plain relay",
            "default",
            "0.060",
            "a&lt;b",
            "none",
        ] {
            assert!(picture.contains(text), "{text} is not in it");
        }
        let dots = picture.matches("<circle").count();
        // Two for each time, two in the legend.
        assert_eq!(dots, 2 * 3 + 2);
    }

    #[test]
    fn times_have_their_place_on_the_scale() {
        let scale = Times {
            least: 1.0,
            most: 100.0,
        };
        assert_eq!(scale.x(1.0), TIMES.0);
        assert_eq!(scale.x(100.0), TIMES.1);
        assert_eq!(scale.x(10.0), (TIMES.0 + TIMES.1) / 2);
        assert_eq!(scale.ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }
}
