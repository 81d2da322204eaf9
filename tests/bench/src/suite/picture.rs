//! A shape's measurements as a picture: a panel for each leg, in it a row for each contender with a bar
//! for its bytes and a marker for each of its times, the median's the largest.
//!
//! Must not: show anything that is not in the document.

use anyhow::Result;
use plotters::prelude::*;

use super::{Document, LegResult};
use crate::canvas::{self, BAND, Canvas, Drawn, FAINT, GRID, INK, Style};
use crate::contender::Contender;

const WIDTH: i32 = 1040;
const MARGIN: i32 = 24;
/// Where titles of rows end.
const LABELS: i32 = 252;
/// Where the bars are; the figure comes after the longest.
const BARS: (i32, i32) = (264, 560);
/// Where the markers are; the figure comes at their end.
const TIMES: (i32, i32) = (650, 960);
const ROW: i32 = 22;
const HEAD: i32 = 62;
/// Name of the leg, and headings of the columns.
const PANEL_HEAD: i32 = 48;
const PANEL_FOOT: i32 = 34;

const STOCK: RGBColor = RGBColor(176, 184, 196);
const MODES: RGBColor = RGBColor(125, 182, 217);
const OURS: RGBColor = RGBColor(37, 99, 175);

fn color(contender: Contender) -> RGBColor {
    match contender {
        Contender::Vmgang | Contender::Prepared => OURS,
        other if other.is_stock() => STOCK,
        _ => MODES,
    }
}

/// The picture as SVG.
pub fn svg(document: &Document) -> Result<String> {
    let height: i32 = HEAD + document.legs.iter().map(panel_height).sum::<i32>();
    canvas::svg((WIDTH, height), |canvas| draw(canvas, document))
}

fn panel_height(leg: &LegResult) -> i32 {
    PANEL_HEAD + leg.contenders().len() as i32 * ROW + PANEL_FOOT
}

fn draw(canvas: &mut Canvas, document: &Document) -> Drawn {
    let title = format!("{}: bytes on the link and total time", document.title);
    canvas.text((MARGIN, 24), &title, Style::new(18, INK).bold())?;
    let about = format!(
        "{}, {} repetitions: a small dot each, a large one for the median",
        document.date, document.repetitions
    );
    canvas.text((MARGIN, 46), &about, Style::new(12, FAINT))?;
    let mut top = HEAD;
    for leg in &document.legs {
        panel(canvas, leg, top)?;
        top += panel_height(leg);
    }
    Ok(())
}

fn panel(canvas: &mut Canvas, leg: &LegResult, top: i32) -> Drawn {
    let contenders = leg.contenders();
    let first_row = top + PANEL_HEAD;
    let bottom = first_row + contenders.len() as i32 * ROW;
    canvas.line((MARGIN, top + 2), (WIDTH - MARGIN, top + 2), GRID)?;
    canvas.text((MARGIN, top + 20), &leg.name, Style::new(15, INK).bold())?;
    let heading = |x, text| ((x, top + 36), text, Style::new(12, FAINT));
    for (at, text, style) in [
        heading(BARS.0, "MB on the link"),
        heading(TIMES.0, "seconds"),
    ] {
        canvas.text(at, text, style)?;
    }
    let most_bytes = leg.moves.iter().map(|one| one.link_bytes).max();
    let most_seconds = leg.moves.iter().map(|one| one.seconds).fold(0.0, f64::max);
    let step = step(most_seconds);
    let scale = (most_seconds / step).ceil().max(1.0) * step;
    let x =
        |seconds: f64| TIMES.0 + (f64::from(TIMES.1 - TIMES.0) * seconds / scale).round() as i32;
    for (place, contender) in contenders.iter().enumerate() {
        if color(*contender) == OURS {
            let y = first_row + place as i32 * ROW;
            canvas.bar((MARGIN, y), (WIDTH - MARGIN, y + ROW), BAND)?;
        }
    }
    let mut tick = 0.0;
    while tick <= scale + step / 2.0 {
        canvas.line((x(tick), first_row), (x(tick), bottom), GRID)?;
        let style = Style::new(11, FAINT).centred();
        canvas.text((x(tick), bottom + 12), &format!("{tick}"), style)?;
        tick += step;
    }
    for (place, contender) in contenders.iter().enumerate() {
        let middle = first_row + place as i32 * ROW + ROW / 2;
        let mut style = Style::new(12, INK).right();
        if *contender == Contender::Vmgang {
            style = style.bold();
        }
        canvas.text((LABELS, middle), contender.title(), style)?;
        if let (Some(bytes), Some(most)) = (leg.bytes(*contender), most_bytes) {
            let length = f64::from(BARS.1 - BARS.0) * bytes / most as f64;
            let end = BARS.0 + (length.round() as i32).max(1);
            canvas.bar((BARS.0, middle - 6), (end, middle + 6), color(*contender))?;
            let text = format!("{:.1}", bytes / 1e6);
            canvas.text((end + 6, middle), &text, Style::new(11, INK))?;
        }
        for one in leg.of(*contender) {
            canvas.small_dot((x(one.seconds), middle), color(*contender))?;
        }
        if let Some(seconds) = leg.seconds(*contender) {
            canvas.dot((x(seconds), middle), color(*contender))?;
            let text = format!("{seconds:.1}");
            canvas.text((TIMES.1 + 24, middle), &text, Style::new(11, INK))?;
        }
    }
    Ok(())
}

/// A round number of which there are about five up to `most`.
fn step(most: f64) -> f64 {
    let raw = (most / 5.0).max(1e-3);
    let decade = 10_f64.powf(raw.log10().floor());
    let fits = [1.0, 2.0, 5.0].into_iter().find(|one| one * decade >= raw);
    fits.unwrap_or(10.0) * decade
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::shape::Shape;
    use crate::suite::testing::{document, moved};

    #[test]
    fn every_leg_contender_and_move_is_in_the_picture() {
        let moves = vec![
            moved(Contender::StockParallel, 10.0, 1_000_000_000, 100),
            moved(Contender::StockParallel, 12.0, 1_000_000_000, 100),
            moved(Contender::Vmgang, 5.5, 70_000_000, 20),
        ];
        let document = document(
            Shape::Mixed,
            &[("1 Gbit/s", "1gbit", moves.clone()), ("a<b", "none", moves)],
        );
        let picture = svg(&document).expect("a picture");
        for text in [
            "1 Gbit/s",
            "a&lt;b",
            "virsh, in parallel",
            "1000.0",
            "70.0",
            "5.5",
        ] {
            assert!(picture.contains(text), "{text} is not in it");
        }
        // In both legs: a small dot for each move, two circles for each median.
        assert_eq!(picture.matches("<circle").count(), 2 * (3 + 2 * 2));
    }

    #[test]
    fn steps_are_round() {
        for (most, wanted) in [
            (5.0, 1.0),
            (6.0, 2.0),
            (12.0, 5.0),
            (90.0, 20.0),
            (0.9, 0.2),
        ] {
            assert!((step(most) - wanted).abs() < 1e-9, "{most}: {}", step(most));
        }
    }
}
