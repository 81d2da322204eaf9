//! Who shares how much with whom, as a picture: one SVG file that needs nothing else.

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::estimate::Estimate;

const CELL: i32 = 56;
/// Smaller ones where there are many, and then without numbers.
const CELL_SMALL: i32 = 18;
const NUMBERS_MAX: usize = 24;
const MARGIN: i32 = 24;
const TITLE: i32 = 56;
/// Pixels of a letter, more or less.
const LETTER: i32 = 8;
/// A longer name is cut.
const NAME_LETTERS_MAX: usize = 24;

/// Draws the matrix of an estimate.
pub fn draw(estimate: &Estimate) -> anyhow::Result<String> {
    let members = estimate.members.len();
    let numbers = members <= NUMBERS_MAX;
    let cell = if numbers { CELL } else { CELL_SMALL };
    let names: Vec<String> = estimate.members.iter().map(|m| shown(&m.name)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max();
    let label = longest.unwrap_or(0) as i32 * LETTER + 12;
    let side = cell * members as i32;
    let left = MARGIN + label;
    let top = MARGIN + TITLE + label;
    let width = (left + side + MARGIN).max(480);
    let height = top + side + MARGIN + 48;
    let mut svg = String::new();
    {
        let size = (width as u32, height as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let failed =
            |error: DrawingAreaErrorKind<_>| anyhow!("the picture cannot be drawn: {error}");
        area.fill(&WHITE).map_err(failed)?;
        let font = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let text =
            |words: String, at: (i32, i32), style: TextStyle<'static>| Text::new(words, at, style);
        let title = format!("What the members of '{}' share", shown(&estimate.gang));
        area.draw(&text(
            title,
            (MARGIN, MARGIN),
            font(18).into_text_style(&area),
        ))
        .map_err(failed)?;
        let subtitle = "percent of the row's pages that the column's member has, too".to_owned();
        let small = font(12).into_text_style(&area);
        area.draw(&text(subtitle, (MARGIN, MARGIN + 26), small.clone()))
            .map_err(failed)?;
        let at_end = Pos::new(HPos::Right, VPos::Center);
        let right = small.pos(at_end);
        let middle = Pos::new(HPos::Center, VPos::Center);
        for (row, name) in names.iter().enumerate() {
            let y = top + cell * row as i32;
            area.draw(&text(name.clone(), (left - 8, y + cell / 2), right.clone()))
                .map_err(failed)?;
            let upwards = font(12).transform(FontTransform::Rotate270);
            let upwards = upwards
                .into_text_style(&area)
                .pos(Pos::new(HPos::Left, VPos::Center));
            let x = left + cell * row as i32 + cell / 2;
            area.draw(&text(name.clone(), (x, top - 8), upwards))
                .map_err(failed)?;
            for column in 0..members {
                let percent = estimate.percent(row, column);
                let x = left + cell * column as i32;
                let corners = [(x, y), (x + cell - 1, y + cell - 1)];
                let fill = match row == column {
                    true => RGBColor(225, 225, 225),
                    false => colour(percent),
                };
                area.draw(&Rectangle::new(corners, fill.filled()))
                    .map_err(failed)?;
                if numbers && row != column {
                    let ink = if percent > 55 { &WHITE } else { &BLACK };
                    let style = ("sans-serif", 13).into_font().color(ink).pos(middle);
                    let at = (x + cell / 2, y + cell / 2);
                    area.draw(&text(percent.to_string(), at, style))
                        .map_err(failed)?;
                }
            }
        }
        let y = top + side + MARGIN;
        for step in 0..=10 {
            let x = left + step * 28;
            let corners = [(x, y), (x + 27, y + 12)];
            let fill = colour(step as u64 * 10);
            area.draw(&Rectangle::new(corners, fill.filled()))
                .map_err(failed)?;
        }
        for (step, words) in [(0, "0 %"), (10, "100 %")] {
            let at = (left + step * 28, y + 18);
            area.draw(&text(words.to_owned(), at, small.clone()))
                .map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// From nearly white to dark blue.
fn colour(percent: u64) -> RGBColor {
    let part = percent.min(100) as f64 / 100.0;
    let between = |from: f64, to: f64| (from + (to - from) * part) as u8;
    RGBColor(
        between(247.0, 8.0),
        between(251.0, 48.0),
        between(255.0, 107.0),
    )
}

/// A name as it is drawn: without what XML cannot hold, and not too long.
fn shown(name: &str) -> String {
    let letters = name.chars().filter(|letter| !letter.is_control());
    letters.take(NAME_LETTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::tests::sample;

    #[test]
    fn any_name_makes_a_well_formed_picture() {
        let hostile = ["<script>", "a&b", "\"x\" '", "\u{1}\u{7f}tab\t", "ünï"];
        let svg = draw(&sample(&hostile)).expect("drawn");
        let document = roxmltree::Document::parse(&svg).expect("well-formed");
        let words: Vec<String> = document
            .descendants()
            .filter(|node| node.has_tag_name("text"))
            .filter_map(|node| node.text().map(|words| words.trim().to_owned()))
            .collect();
        assert!(words.iter().any(|words| words == "<script>"), "{words:?}");
        let cells = words.iter().filter(|words| *words == "50").count();
        assert_eq!(cells, 5 * 4, "{words:?}");
        assert!(
            document
                .descendants()
                .all(|node| !node.has_tag_name("script"))
        );
    }

    #[test]
    fn many_members_are_drawn_smaller() {
        let names: Vec<String> = (0..64).map(|number| format!("vm{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let svg = draw(&sample(&names)).expect("drawn");
        let document = roxmltree::Document::parse(&svg).expect("well-formed");
        let width: u32 = document
            .root_element()
            .attribute("width")
            .and_then(|width| width.parse().ok())
            .expect("a width");
        assert!(width < 1400, "{width}");
    }
}
