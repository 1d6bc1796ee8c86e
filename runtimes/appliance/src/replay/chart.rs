//! The curves of hit ratio by size, as SVG.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::replay::report::{BELADY, Report, TraceReport};

const WIDTH: u32 = 800;
const HEIGHT_OF_ONE: u32 = 420;
/// Colours that are told apart by everyone (Okabe and Ito), in order of the policies.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(150, 140, 40),
];
const GREY: RGBColor = RGBColor(221, 221, 221);

/// One chart below the other, for each trace: a line for each policy, and Belady's above them.
pub(super) fn draw(report: &Report) -> String {
    let mut svg = String::new();
    let count = report.traces.len();
    let size = (WIDTH, HEIGHT_OF_ONE * count as u32);
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    root.fill(&WHITE).expect("text takes it");
    for (area, trace) in root.split_evenly((count, 1)).iter().zip(&report.traces) {
        draw_one(area, trace).expect("text takes it");
    }
    root.present().expect("text takes it");
    drop(root);
    svg
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_one<'a>(area: &Area<'a>, trace: &TraceReport) -> Result<(), DrawError<'a>> {
    let mut shares: Vec<f64> = trace.sizes.iter().map(|size| size.share).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let mut chart = ChartBuilder::on(area)
        .caption(title(trace), ("sans-serif", 16))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(
            sizes_shown(&shares).log_scale().with_key_points(shares),
            0.0..ratio_shown(trace),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY)
        .x_desc("cache size, share of the blocks touched")
        .y_desc("hit ratio")
        .x_label_formatter(&|share| size_shown(trace, *share))
        .y_label_formatter(&|ratio| format!("{:.0}%", 100.0 * ratio))
        .draw()?;
    for (nth, first) in trace.sizes[0].policies.iter().enumerate() {
        let style = match first.policy.as_str() {
            BELADY => BLACK.stroke_width(1),
            _ => COLOURS[nth % COLOURS.len()].stroke_width(2),
        };
        let mut points: Vec<(f64, f64)> =
            trace.sizes.iter().map(|size| (size.share, size.policies[nth].hit_ratio)).collect();
        points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        chart
            .draw_series(LineSeries::new(points, style).point_size(3))?
            .label(&first.policy)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(GREY)
        .draw()
}

/// The name of the file, without where it is.
fn title(trace: &TraceReport) -> &str {
    trace.trace.rsplit('/').next().expect("splitting gives a part")
}

/// A size as it was asked for.
fn size_shown(trace: &TraceReport, share: f64) -> String {
    let size = trace.sizes.iter().find(|size| size.share == share);
    size.map_or_else(String::new, |size| size.size.clone())
}

/// A little more than the sizes, so that a single one has width too.
fn sizes_shown(shares: &[f64]) -> Range<f64> {
    let least = shares.first().expect("there is a size");
    let most = shares.last().expect("there is a size");
    least / 1.1..most * 1.1
}

/// From nothing to the next tenth above the best.
fn ratio_shown(trace: &TraceReport) -> f64 {
    let best = trace.sizes.iter().map(|size| size.belady().hit_ratio).fold(0.0, f64::max);
    ((best * 10.0).ceil() / 10.0).clamp(0.1, 1.0)
}

#[cfg(test)]
mod tests {
    use crate::replay::report::tests::example;

    use super::*;

    #[test]
    fn every_trace_has_a_chart_with_every_policy() {
        let svg =
            draw(&Report::new(vec![example("x/first & last", 1, 5, 10), example("b", 2, 3, 4)]));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains("\nfirst &amp; last\n"), "{svg}");
        for label in ["lru", "other", BELADY, "4K", "20K"] {
            assert_eq!(svg.matches(&format!("\n{label}\n")).count(), 2, "{label}: {svg}");
        }
    }

    #[test]
    fn one_size_and_no_hits_can_be_drawn() {
        let mut trace = example("a", 0, 0, 0);
        trace.sizes.truncate(1);
        draw(&Report::new(vec![trace]));
    }
}
