//! Times over links as a picture: a panel for each kind of guests, a line for each way to move them.
//!
//! Must not: show anything that is not in the tables.

use anyhow::Result;
use plotters::prelude::*;

use crate::canvas::{self, Canvas, Drawn, FAINT, GRID, INK, Style};
use crate::contender::Contender;
use crate::scaling::derive::{Kind, Mix};
use crate::scaling::report::{Question, short, time};
use crate::scaling::{Qemu, WAYS, predict};
use crate::suite::Document;

const WIDTH: i32 = 1040;
const HEIGHT: i32 = 440;
const MARGIN: i32 = 24;
/// Height of a panel's plot, from its top to its bottom.
const PLOT: (i32, i32) = (96, 366);
/// Where a panel's plot begins in it, and how much is left after it.
const SIDES: (i32, i32) = (56, 30);

fn color(way: Contender) -> RGBColor {
    match way {
        Contender::Vmgang => RGBColor(37, 99, 175),
        Contender::StockParallelZstd => RGBColor(202, 138, 4),
        _ => RGBColor(120, 130, 145),
    }
}

/// The picture as SVG.
pub fn svg(question: &Question, documents: &[Document]) -> Result<String> {
    canvas::svg((WIDTH, HEIGHT), |canvas| draw(canvas, question, documents))
}

fn draw(canvas: &mut Canvas, question: &Question, documents: &[Document]) -> Drawn {
    let title = format!(
        "{} guests of {} GiB: time of an evacuation, and what it waits for",
        question.some_guests(),
        question.memory_gib
    );
    canvas.text((MARGIN, 24), &title, Style::new(18, INK).bold())?;
    let about = format!(
        "computed; KVM, QEMU's costs as published, {} cores of each host for the migration",
        question.cores
    );
    canvas.text((MARGIN, 46), &about, Style::new(12, FAINT))?;
    let width = WIDTH / Kind::ALL.len() as i32;
    for (place, kind) in Kind::ALL.into_iter().enumerate() {
        let left = width * place as i32;
        panel(
            canvas,
            question,
            &Mix::derive(kind, documents),
            (left, left + width),
        )?;
    }
    let mut x = MARGIN + SIDES.0;
    for way in WAYS {
        canvas.bar((x, HEIGHT - 22), (x + 18, HEIGHT - 18), color(way))?;
        canvas.text((x + 26, HEIGHT - 20), short(way), Style::new(12, INK))?;
        x += 180;
    }
    Ok(())
}

fn panel(canvas: &mut Canvas, question: &Question, mix: &Mix, sides: (i32, i32)) -> Drawn {
    let (left, right) = (sides.0 + SIDES.0, sides.1 - SIDES.1);
    let heading = format!("guests like `{}`", mix.kind.name());
    canvas.text((left, PLOT.0 - 22), &heading, Style::new(14, INK).bold())?;
    let lines = WAYS.map(|way| {
        let work = mix.work(way, question.some_guests(), question.memory_gib);
        let costs = mix.costs(way, Qemu::Published);
        let at = |gigabits: f64| {
            let prediction = predict(&work, &costs, &question.site(gigabits, question.cores));
            (gigabits, prediction.seconds(), prediction.bottleneck().0)
        };
        let points: Vec<_> = question.gigabits.iter().copied().map(at).collect();
        let between = between(&question.gigabits).map(at).collect::<Vec<_>>();
        (way, points, between)
    });
    let all = || lines.iter().flat_map(|(_, points, _)| points.iter());
    let (links, times) = (span(all().map(|one| one.0)), span(all().map(|one| one.1)));
    let x = |gigabits: f64| left + scaled(gigabits, links, right - left);
    let y = |seconds: f64| PLOT.1 - scaled(seconds, times, PLOT.1 - PLOT.0);
    let mut decade = times.0;
    while decade <= times.1 * 1.001 {
        canvas.line((left, y(decade)), (right, y(decade)), GRID)?;
        let style = Style::new(11, FAINT).right();
        canvas.text((left - 8, y(decade)), &format!("{decade} s"), style)?;
        decade *= 10.0;
    }
    for gigabits in &question.gigabits {
        let (at, text) = ((x(*gigabits), PLOT.1 + 14), format!("{gigabits}"));
        canvas.text(at, &text, Style::new(11, FAINT).centred())?;
    }
    let below = ((left + right) / 2, PLOT.1 + 32);
    canvas.text(below, "Gbit/s", Style::new(11, FAINT).centred())?;
    for (way, points, between) in &lines {
        for pair in between.windows(2) {
            canvas.line(
                (x(pair[0].0), y(pair[0].1)),
                (x(pair[1].0), y(pair[1].1)),
                color(*way),
            )?;
        }
        for (gigabits, seconds, term) in points {
            canvas.dot((x(*gigabits), y(*seconds)), color(*way))?;
            if *way == Contender::Vmgang {
                let style = || Style::new(11, INK).centred();
                let at = (x(*gigabits), y(*seconds) + 14);
                canvas.text(at, &time(*seconds), style())?;
                canvas.text((at.0, at.1 + 13), term.title(), style())?;
            }
        }
    }
    Ok(())
}

/// From the slowest link to the fastest, in small steps of equal ratio.
fn between(gigabits: &[f64]) -> impl Iterator<Item = f64> {
    const STEPS: i32 = 80;
    let least = gigabits.iter().copied().fold(f64::INFINITY, f64::min);
    let most = gigabits.iter().copied().fold(0.0, f64::max);
    let steps = if least < most { STEPS } else { 0 };
    let ratio = (most / least).powf(1.0 / f64::from(STEPS));
    (0..=steps).map(move |step| least * ratio.powi(step))
}

/// Whole decades around all of them.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut least, mut most) = (f64::INFINITY, 0.0_f64);
    for value in values {
        (least, most) = (least.min(value), most.max(value));
    }
    let decade = |exponent: f64| 10_f64.powf(exponent);
    match least.is_finite() && least > 0.0 {
        true => (decade(least.log10().floor()), decade(most.log10().ceil())),
        false => (1.0, 10.0),
    }
}

fn scaled(value: f64, (least, most): (f64, f64), length: i32) -> i32 {
    let whole = (most / least).log10().max(1e-9);
    (f64::from(length) * (value / least).log10() / whole).round() as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::report::tests::question;

    #[test]
    fn every_way_has_a_dot_for_every_link_in_every_panel() {
        let picture = svg(&question(), &[]).expect("a picture");
        // Two circles each.
        assert_eq!(picture.matches("<circle").count(), 2 * 2 * 3 * 5);
        for text in ["256 guests", "mixed", "idle", "multifd + zstd", "Gbit/s"] {
            assert!(picture.contains(text), "{text} is not in it");
        }
        let mut one = question();
        one.gigabits = vec![10.0];
        one.guests.clear();
        assert!(svg(&one, &[]).is_ok());
    }

    #[test]
    fn scales_are_whole_decades() {
        assert_eq!(span([3.0, 40.0].into_iter()), (1.0, 100.0));
        assert_eq!(span([].into_iter()), (1.0, 10.0));
        let steps: Vec<f64> = between(&[10.0, 1.0, 100.0]).collect();
        assert!(steps[0] == 1.0 && (steps[40] - 10.0).abs() < 1e-6 && steps.len() == 81);
        assert_eq!(between(&[10.0]).count(), 1);
        assert_eq!(scaled(10.0, (1.0, 100.0), 200), 100);
    }
}
