//! What pictures are drawn with: text, bars, lines and dots on an SVG, in pixels, and their colours.
//!
//! Must not: know what is drawn.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub const INK: RGBColor = RGBColor(31, 41, 55);
pub const FAINT: RGBColor = RGBColor(107, 114, 128);
pub const GRID: RGBColor = RGBColor(225, 229, 235);
pub const BAND: RGBColor = RGBColor(237, 244, 255);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub type Drawn = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What is drawn on white, as SVG.
pub fn svg(
    (width, height): (i32, i32),
    draw: impl FnOnce(&mut Canvas<'_, '_>) -> Drawn,
) -> Result<String> {
    let mut out = String::new();
    {
        let area =
            SVGBackend::with_string(&mut out, (width as u32, height as u32)).into_drawing_area();
        let mut canvas = Canvas { area: &area };
        canvas
            .bar((0, 0), (width, height), WHITE)
            .and_then(|()| draw(&mut canvas))
            .map_err(|error| anyhow!("cannot draw: {error}"))?;
        area.present()
            .map_err(|error| anyhow!("cannot draw: {error}"))?;
    }
    Ok(out)
}

/// Text and simple shapes, in pixels.
pub struct Canvas<'a, 'b> {
    area: &'a Area<'b>,
}

impl Canvas<'_, '_> {
    pub fn text(&mut self, at: (i32, i32), text: &str, style: Style) -> Drawn {
        let weight = match style.bold {
            true => FontStyle::Bold,
            false => FontStyle::Normal,
        };
        // The backend writes what it is given divided by this.
        let size = f64::from(style.size) * 1.24;
        let font = FontDesc::new(FontFamily::SansSerif, size, weight);
        let place = Pos::new(style.anchor, VPos::Center);
        let style = font.color(&style.color).pos(place);
        self.area
            .draw(&Text::new(text.to_owned(), at, style))
            .map_err(|error| error.to_string().into())
    }

    pub fn bar(&mut self, from: (i32, i32), to: (i32, i32), color: RGBColor) -> Drawn {
        self.area
            .draw(&Rectangle::new([from, to], color.filled()))
            .map_err(|error| error.to_string().into())
    }

    pub fn line(&mut self, from: (i32, i32), to: (i32, i32), color: RGBColor) -> Drawn {
        self.area
            .draw(&PathElement::new(vec![from, to], color.stroke_width(1)))
            .map_err(|error| error.to_string().into())
    }

    /// One of many.
    pub fn small_dot(&mut self, at: (i32, i32), color: RGBColor) -> Drawn {
        self.area
            .draw(&Circle::new(at, 2, color.filled()))
            .map_err(|error| error.to_string().into())
    }

    pub fn dot(&mut self, at: (i32, i32), color: RGBColor) -> Drawn {
        self.area
            .draw(&Circle::new(at, 5, WHITE.filled()))
            .and_then(|()| self.area.draw(&Circle::new(at, 4, color.filled())))
            .map_err(|error| error.to_string().into())
    }
}

/// How a piece of text looks.
pub struct Style {
    size: i32,
    color: RGBColor,
    bold: bool,
    anchor: HPos,
}

impl Style {
    pub fn new(size: i32, color: RGBColor) -> Self {
        Self {
            size,
            color,
            bold: false,
            anchor: HPos::Left,
        }
    }

    pub fn bold(mut self) -> Self {
        self.bold = true;
        self
    }

    pub fn right(mut self) -> Self {
        self.anchor = HPos::Right;
        self
    }

    pub fn centred(mut self) -> Self {
        self.anchor = HPos::Center;
        self
    }
}
