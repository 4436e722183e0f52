//! From rates to tables: medians, ratios, Markdown. Pure.

use std::fmt::Write;

/// Who was measured: only a peer can be the best peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Somebody else's loader.
    Peer,
    /// `detco`.
    Ours,
    /// Decoding and resizing alone.
    Floor,
}

/// One subject on one task: images/s of every round, for each number of workers measured.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) role: Role,
    /// In the order of the table's numbers of workers; empty where nothing was measured.
    pub(crate) rates: Vec<Vec<f64>>,
}

/// Median, least and largest of some rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) largest: f64,
}

impl Spread {
    /// None of nothing.
    pub(crate) fn of(rates: &[f64]) -> Option<Spread> {
        let mut sorted = rates.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, largest) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Spread { median: (low + high) / 2.0, least, largest })
    }
}

/// The Markdown table of one task: fastest first by the first number of workers.
pub(crate) fn render(rows: &[Row], workers: &[usize]) -> String {
    let median = |row: &Row, at: usize| Some(Spread::of(row.rates.get(at)?)?.median);
    let best = |role: Role, at: usize| {
        let rates = rows.iter().filter(|row| row.role == role).filter_map(|row| median(row, at));
        rates.max_by(f64::total_cmp)
    };
    let mut header = vec![String::new()];
    for count in workers {
        let noun = if *count == 1 { "worker" } else { "workers" };
        header.push(format!("{count} {noun}: images/s (min-max)"));
        header.push("of the best peer".into());
        header.push("of the floor".into());
    }
    for count in &workers[1..] {
        header.push(format!("{count}/{} workers", workers[0]));
    }
    let mut order: Vec<&Row> = rows.iter().collect();
    let key = |row: &Row| median(row, 0).unwrap_or(0.0);
    order.sort_by(|a, b| key(b).total_cmp(&key(a)));
    let mut cells = vec![header];
    for row in order {
        let mut line = vec![row.name.clone()];
        for at in 0..workers.len() {
            let spread = row.rates.get(at).and_then(|rates| Spread::of(rates));
            line.push(spread.map_or("-".into(), rate));
            line.push(ratio(median(row, at), best(Role::Peer, at)));
            line.push(ratio(median(row, at), best(Role::Floor, at)));
        }
        for at in 1..workers.len() {
            line.push(ratio(median(row, at), median(row, 0)));
        }
        cells.push(line);
    }
    markdown(&cells)
}

/// `917 (905-921)`; one digit more where images are slow.
fn rate(spread: Spread) -> String {
    let Spread { median, least, largest } = spread;
    match median {
        100.0.. => format!("{median:.0} ({least:.0}-{largest:.0})"),
        _ => format!("{median:.1} ({least:.1}-{largest:.1})"),
    }
}

fn ratio(of: Option<f64>, to: Option<f64>) -> String {
    match (of, to) {
        (Some(of), Some(to)) if to > 0.0 => format!("{:.2}", of / to),
        _ => "-".into(),
    }
}

/// Columns padded, so that it reads as a table in a terminal too.
fn markdown(cells: &[Vec<String>]) -> String {
    let columns = cells.first().map_or(0, Vec::len);
    let width = |column: usize| cells.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for (number, line) in cells.iter().enumerate() {
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} "); // writing to a String does not fail
        }
        text.push_str("|\n");
        if number == 0 {
            text.extend(widths.iter().map(|width| format!("|{}", "-".repeat(width + 2))));
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, role: Role, rates: &[&[f64]]) -> Row {
        let rates = rates.iter().map(|rates| rates.to_vec()).collect();
        Row { name: name.into(), role, rates }
    }

    #[test]
    fn medians_of_odd_and_even_numbers_of_rounds() {
        let odd = Spread::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(odd, Spread { median: 2.0, least: 1.0, largest: 3.0 });
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of(&[7.0]).unwrap().median, 7.0);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn a_table_is_sorted_and_compares_with_the_best_peer_and_the_floor() {
        let rows = [
            row("slow", Role::Peer, &[&[50.0, 52.0, 51.0], &[99.0, 101.0, 100.0]]),
            row("fast", Role::Peer, &[&[160.0], &[]]),
            row("detco", Role::Ours, &[&[400.0], &[780.0]]),
            row("floor", Role::Floor, &[&[640.0], &[1280.0]]),
            row("broken", Role::Peer, &[&[], &[]]),
        ];
        let text = render(&rows, &[1, 2]);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
        let names: Vec<&str> = lines.iter().map(|line| line[1]).collect();
        assert!(names[1].starts_with("---"));
        assert_eq!(
            [names[2], names[3], names[4], names[5], names[6]],
            ["floor", "detco", "fast", "slow", "broken"]
        );
        let detco = &lines[3][2..9];
        assert_eq!(
            detco,
            ["400 (400-400)", "2.50", "0.62", "780 (780-780)", "7.80", "0.61", "1.95"]
        );
        assert_eq!(lines[4][2..9], ["160 (160-160)", "1.00", "0.25", "-", "-", "-", "-"]);
        assert_eq!(lines[5][2], "51.0 (50.0-52.0)");
        assert_eq!(lines[6][2..9], ["-"; 7]);
        let length = text.lines().next().unwrap().chars().count();
        assert!(text.lines().all(|line| line.chars().count() == length), "{text}");
    }

    #[test]
    fn one_number_of_workers_has_no_scaling_column() {
        let text = render(&[row("a", Role::Peer, &[&[10.0]])], &[2]);
        assert_eq!(text.lines().next().unwrap().matches('|').count(), 5, "{text}");
        assert!(text.contains("2 workers: images/s"), "{text}");
    }
}
