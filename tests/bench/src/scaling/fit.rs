//! Lines through a few points.
//!
//! Must not: know what is fitted.

/// `y = at_zero + slope * x`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    pub at_zero: f64,
    pub slope: f64,
}

/// The line of least squares; `None` where all points have the same x.
pub fn line(points: &[(f64, f64)]) -> Option<Line> {
    let slope = slope_within(&[points.to_vec()], f64::EPSILON)?;
    let (x, y) = centre(points);
    Some(Line {
        at_zero: y - slope * x,
        slope,
    })
}

/// The slope that several groups of points have in common, whatever else sets them apart; `None` where
/// their x differ so little within each that the sum of squares is below `least`.
pub fn slope_within(groups: &[Vec<(f64, f64)>], least: f64) -> Option<f64> {
    let (mut squares, mut products) = (0.0, 0.0);
    for group in groups {
        let (x_mean, y_mean) = centre(group);
        for (x, y) in group {
            squares += (x - x_mean) * (x - x_mean);
            products += (x - x_mean) * (y - y_mean);
        }
    }
    (squares > least).then(|| products / squares)
}

fn centre(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let sum = points
        .iter()
        .fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    (sum.0 / count, sum.1 / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again() {
        let points = [3.0, 4.0, 6.0, 24.0].map(|x| (x, 50.0 + 0.5 * x));
        let found = line(&points).expect("a line");
        assert!((found.at_zero - 50.0).abs() < 1e-9 && (found.slope - 0.5).abs() < 1e-9);
        assert_eq!(line(&[(4.0, 1.0), (4.0, 2.0)]), None);
        assert_eq!(line(&[]), None);
    }

    #[test]
    fn groups_that_lie_apart_have_a_slope_in_common() {
        let groups = [
            vec![(1.0, 10.0), (3.0, 14.0)],
            vec![(2.0, 100.0), (6.0, 108.0)],
            vec![(7.0, 0.0)],
        ];
        let slope = slope_within(&groups, 0.1).expect("a slope");
        assert!((slope - 2.0).abs() < 1e-9);
        assert_eq!(slope_within(&groups[2..], 0.1), None);
    }
}
