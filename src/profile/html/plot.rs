//! Plots as SVG text: bars, lines, histograms. Colours come from the page's style by class.

use std::fmt::Write as _;

use super::escape;

/// Width of the larger plots; they shrink with the page.
const WIDTH: f64 = 720.0;

/// A row of a bar plot.
pub(super) struct Bar {
    /// What it stands for.
    pub(super) label: String,
    /// Its pieces from left to right.
    pub(super) parts: Vec<Part>,
}

/// A piece of a bar.
pub(super) struct Part {
    /// Its class, which is also its name.
    pub(super) class: &'static str,
    /// Its length.
    pub(super) value: f64,
}

/// A line of a line plot.
pub(super) struct Line {
    /// What it stands for.
    pub(super) name: &'static str,
    /// Its class.
    pub(super) class: &'static str,
    /// x and y, ascending in x.
    pub(super) points: Vec<[f64; 2]>,
    /// Whether each point is marked.
    pub(super) dots: bool,
}

/// Multiples of a round step between `low` and `high`, about `parts` of them.
fn ticks(low: f64, high: f64, parts: f64) -> Vec<f64> {
    let rough = ((high - low) / parts).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| *step >= rough * 0.999).unwrap_or(rough);
    let first = (low / step - 1e-6).ceil();
    let count = (high / step + 1e-6 - first).clamp(0.0, 100.0) as usize;
    (0..=count).map(|i| (first + i as f64) * step).collect()
}

/// A number as short as it can be said.
fn short(number: f64) -> String {
    match number.abs() {
        size if size >= 1000.0 => super::count(number),
        size if size >= 10.0 || size == number.round().abs() => format!("{number:.0}"),
        size if size >= 0.1 => format!("{number:.1}"),
        _ => format!("{number:.3}"),
    }
}

/// A time in microseconds with its unit.
pub(super) fn micros(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{us:.2} µs"),
        us if us < 1e3 => format!("{us:.0} µs"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

/// Stacked horizontal bars on one scale.
pub(super) fn bars(rows: &[Bar], unit: &str) -> String {
    const LABEL: f64 = 120.0;
    const VALUE: f64 = 70.0;
    const ROW: f64 = 26.0;
    let total = |bar: &Bar| bar.parts.iter().map(|part| part.value).sum::<f64>();
    let most = rows.iter().map(total).fold(1e-9, f64::max);
    let scale = (WIDTH - LABEL - VALUE) / most;
    let height = rows.len() as f64 * ROW + 34.0;
    let mut svg = open(WIDTH, height, unit);
    for tick in ticks(0.0, most, 6.0) {
        let x = LABEL + tick * scale;
        let (low, text) = (height - 34.0, height - 20.0);
        let _ = writeln!(
            svg,
            "<line class=\"rule\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{low}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{text}\" text-anchor=\"middle\">{}</text>",
            short(tick)
        );
    }
    for (row, bar) in rows.iter().enumerate() {
        let (top, mut x) = (row as f64 * ROW + 4.0, LABEL);
        let middle = top + 13.0;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>",
            LABEL - 8.0,
            escape(&bar.label)
        );
        for part in bar.parts.iter().filter(|part| part.value > 0.0) {
            let width = part.value * scale;
            let _ = writeln!(
                svg,
                "<rect class=\"{0}\" x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"18\">\
                 <title>{0}: {1}</title></rect>",
                part.class,
                short(part.value)
            );
            x += width;
        }
        let value = short(total(bar));
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{middle}\">{value}</text>", x + 6.0);
    }
    let _ = writeln!(
        svg,
        "<text class=\"axis\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n</svg>",
        LABEL + (WIDTH - LABEL - VALUE) / 2.0,
        height - 4.0,
        escape(unit)
    );
    svg
}

/// The frame of a line plot: data to pixels.
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
    x: [f64; 2],
    most: f64,
}

impl Frame {
    fn at(&self, [x, y]: [f64; 2]) -> (f64, f64) {
        let [from, to] = self.x;
        let across = self.left + (x - from) / (to - from).max(1e-9) * self.width;
        (across, self.top + (1.0 - y / self.most) * self.height)
    }

    fn axes(&self, svg: &mut String, x_ticks: &[f64], [x_name, y_name]: [&str; 2]) {
        let bottom = self.top + self.height;
        for tick in ticks(0.0, self.most, 4.0) {
            let (_, y) = self.at([self.x[0], tick]);
            let _ = writeln!(
                svg,
                "<line class=\"rule\" x1=\"{}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                self.left,
                self.left + self.width,
                self.left - 6.0,
                y + 4.0,
                short(tick)
            );
        }
        for &tick in x_ticks {
            let (x, _) = self.at([tick, 0.0]);
            let _ = writeln!(
                svg,
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                short(tick)
            );
        }
        let _ = writeln!(
            svg,
            "<text class=\"axis\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text class=\"axis\" x=\"{}\" y=\"{}\">{}</text>",
            self.left + self.width / 2.0,
            bottom + 32.0,
            escape(x_name),
            self.left,
            self.top - 8.0,
            escape(y_name)
        );
    }
}

/// Lines over one x axis, y from 0; `shade` marks a stretch of x.
pub(super) fn lines(lines: &[Line], x_name: &str, y_name: &str, shade: Option<[f64; 2]>) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let low = points().map(|point| point[0]).fold(f64::INFINITY, f64::min).min(0.0);
    let high = points().map(|point| point[0]).fold(low + 1e-9, f64::max);
    let most = points().map(|point| point[1]).fold(1e-9, f64::max) * 1.08;
    // Names stand to the right of the lines, where there are several.
    let names = if lines.len() > 1 { 110.0 } else { 16.0 };
    let (width, height) = (WIDTH - 70.0 - names, 180.0);
    let frame = Frame { left: 70.0, top: 24.0, width, height, x: [low, high], most };
    let mut svg = open(WIDTH, 24.0 + height + 40.0, &format!("{y_name} by {x_name}"));
    if let Some([from, to]) = shade {
        let ((from, top), (to, _)) =
            (frame.at([from.max(low), most]), frame.at([to.min(high), most]));
        let _ = writeln!(
            svg,
            "<rect class=\"shade\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" \
             height=\"{height}\"><title>measured</title></rect>",
            (to - from).max(0.0)
        );
    }
    // Marked points are what there is; between unmarked ones, any round number.
    let x_ticks = match lines.first() {
        Some(line) if line.dots => line.points.iter().map(|point| point[0]).collect(),
        _ => ticks(low, high, 8.0),
    };
    frame.axes(&mut svg, &x_ticks, [x_name, y_name]);
    for line in lines {
        let path: Vec<String> = line
            .points
            .iter()
            .map(|point| frame.at(*point))
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline class=\"line {}\" points=\"{}\"/>",
            line.class,
            path.join(" ")
        );
        for point in line.points.iter().filter(|_| line.dots) {
            let (x, y) = frame.at(*point);
            let _ = writeln!(
                svg,
                "<circle class=\"dot {}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{}: {}</title>\
                 </circle>",
                line.class,
                short(point[0]),
                short(point[1])
            );
        }
        if let (Some(last), true) = (line.points.last(), lines.len() > 1) {
            let (x, y) = frame.at(*last);
            let (x, y) = (x + 8.0, y + 4.0);
            let _ = writeln!(
                svg,
                "<text class=\"axis\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
                line.name
            );
        }
    }
    svg + "</svg>\n"
}

/// Waits by length on a logarithmic axis: from and to in microseconds, and how many.
pub(super) fn histogram(buckets: &[(f64, f64, u64)]) -> String {
    const WIDTH: f64 = 230.0;
    const HEIGHT: f64 = 84.0;
    const LOW: f64 = 18.0;
    if buckets.is_empty() {
        return "<p class=\"note\">none</p>\n".to_owned();
    }
    let log = |micros: f64| micros.max(0.01).log10();
    let from = buckets.iter().map(|(from, ..)| log(*from)).fold(f64::INFINITY, f64::min).floor();
    let to = buckets.iter().map(|(_, to, _)| log(*to)).fold(from, f64::max).ceil().max(from + 1.0);
    let most = buckets.iter().map(|(.., count)| *count).max().unwrap_or(1) as f64;
    let across = |micros: f64| (log(micros) - from) / (to - from) * WIDTH;
    let mut svg = open(WIDTH, HEIGHT + LOW, "waits by length");
    for (low, high, count) in buckets {
        let height = (*count as f64 / most * (HEIGHT - 4.0)).max(1.0);
        let (x, width) = (across(*low), (across(*high) - across(*low)).max(1.0));
        let _ = writeln!(
            svg,
            "<rect class=\"wait\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
             height=\"{height:.1}\"><title>{} to {}: {count}</title></rect>",
            HEIGHT - height,
            micros(*low),
            micros(*high)
        );
    }
    let _ = writeln!(
        svg,
        "<line class=\"rule\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{HEIGHT}\" y2=\"{HEIGHT}\"/>"
    );
    let decades = (to - from) as i32;
    for decade in (0..=decades).step_by(1 + decades as usize / 4) {
        let x = f64::from(decade) / f64::from(decades) * WIDTH;
        let anchor = match decade {
            0 => "start",
            decade if decade == decades => "end",
            _ => "middle",
        };
        let name = decade_name(from as i32 + decade);
        let _ = writeln!(
            svg,
            "<text class=\"tick\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{name}</text>",
            HEIGHT + 13.0
        );
    }
    svg + "</svg>\n"
}

/// `10 µs` for 1: powers of ten of a microsecond.
fn decade_name(power: i32) -> String {
    let (unit, power) = match power {
        power if power < 0 => ("ns", power + 3),
        power if power < 3 => ("µs", power),
        power if power < 6 => ("ms", power - 3),
        power => ("s", power - 6),
    };
    format!("{} {unit}", 10f64.powi(power))
}

fn open(width: f64, height: f64, label: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {width} {height}\" style=\"max-width:{width}px\" role=\"img\" \
         aria-label=\"{}\">\n",
        escape(label)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_up() {
        assert_eq!(ticks(0.0, 10.0, 5.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.0, 3.9, 4.0), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(ticks(-2.3, 6.1, 4.0), [0.0, 5.0]);
        assert_eq!(ticks(-2.3, 6.1, 5.0), [-2.0, 0.0, 2.0, 4.0, 6.0]);
        assert!(ticks(0.0, 0.0, 4.0).len() <= 101);
        assert_eq!([-2, 0, 2, 4, 6].map(decade_name), ["10 ns", "1 µs", "100 µs", "10 ms", "1 s"]);
    }

    #[test]
    fn plots_are_whole_whatever_the_numbers() {
        for values in [vec![], vec![0.0], vec![1e-9, 1e9, 3.0]] {
            let part = |value: f64| Part { class: "views", value };
            let rows: Vec<Bar> = values
                .iter()
                .map(|value| Bar { label: "<b>".into(), parts: vec![part(*value)] })
                .collect();
            let points: Vec<[f64; 2]> = values.iter().map(|value| [*value, *value]).collect();
            let line = Line { name: "all", class: "measured", points, dots: true };
            let buckets: Vec<(f64, f64, u64)> =
                values.iter().map(|value| (*value, value * 1.25, 1)).collect();
            let plots = [bars(&rows, "ms"), lines(&[line], "x", "y", None), histogram(&buckets)];
            for svg in plots {
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert!(!svg.contains("<b>"), "{svg}");
                assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
            }
        }
    }
}
