//! The report as an HTML page: tables and plots in one self-contained file, light or dark as the reader's
//! system prefers.

mod plot;

use std::fmt::Write as _;

use detco_shards::stats::{CHANNELS, STAGES};
use indicatif::{HumanBytes, HumanCount};

use super::verdict::{count, percent};
use super::{ChannelTimes, Report, Run};
use plot::{Bar, Line, Part};

const STYLE: &str = include_str!("html/style.css");

/// The page.
pub fn page(report: &Report) -> String {
    let mut body = String::new();
    head(report, &mut body);
    if report.runs.len() > 1 {
        scaling(report, &mut body);
    }
    stage_bars(report, &mut body);
    for run in &report.runs {
        section(run, &mut body);
    }
    let title = format!("detco profile: {}", subject(report));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         </body>\n</html>\n",
        escape(&title)
    )
}

/// Escapes text for use between tags and in quoted attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

fn subject(report: &Report) -> String {
    match &report.data.run {
        Some(run) => run.display().to_string(),
        None => report.data.spec.join(" "),
    }
}

fn workers(number: usize) -> String {
    if number == 1 { "1 worker".to_owned() } else { format!("{number} workers") }
}

fn head(report: &Report, out: &mut String) {
    let settings = &report.settings;
    let mut facts = vec![("data", subject(report))];
    if let Some(size) = &report.data.size {
        let shards = match size.shards == size.shards_of {
            true => HumanCount(size.shards).to_string(),
            false => format!("{} of {}", HumanCount(size.shards), HumanCount(size.shards_of)),
        };
        facts.push(("samples", HumanCount(size.samples).to_string()));
        facts.push(("shards", format!("{shards}, {}", HumanBytes(size.bytes))));
        facts.push(("page cache", if settings.cold { "cold" } else { "warm" }.to_owned()));
    }
    facts.push(("mode", settings.mode.clone()));
    facts.push(("recipe", settings.recipe.clone()));
    facts.push(("batch", settings.batch.to_string()));
    if let Some(rate) = settings.consumer_images_per_s {
        facts.push(("consumer", format!("takes {} images/s", count(rate))));
    }
    if let Some(machine) = &report.machine {
        facts.push(("cores", machine.cores.to_string()));
        facts.extend(machine.cpu.clone().map(|cpu| ("processor", cpu)));
        facts.push(("vectors", machine.simd.to_owned()));
        facts.extend(machine.memory_bytes.map(|b| ("memory", HumanBytes(b).to_string())));
        facts.extend(machine.file_system.clone().map(|kind| ("file system", kind)));
        facts.push(("decoder", machine.decoder.to_owned()));
    }
    facts.push(("detco", report.detco.to_owned()));
    // Writing to a String cannot fail, here and below.
    let _ = write!(
        out,
        "<h1>detco profile</h1>\n<p class=\"verdict\">{}</p>\n<dl class=\"facts\">\n",
        escape(&report.verdict.text)
    );
    for (name, value) in facts {
        let _ = writeln!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    out.push_str("</dl>\n");
}

fn scaling(report: &Report, out: &mut String) {
    let mut points: Vec<[f64; 2]> =
        report.runs.iter().map(|run| [run.workers as f64, run.images_per_s]).collect();
    points.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [few, rate] = points[0];
    let most = points[points.len() - 1][0];
    let ideal = vec![[few, rate], [most, rate / few * most]];
    let lines = [
        Line { name: "measured", class: "measured", points: points.clone(), dots: true },
        Line { name: "in proportion", class: "ideal", points: ideal, dots: false },
    ];
    out.push_str("<section>\n<h2>Images a second by workers</h2>\n");
    out.push_str(&plot::lines(&lines, "workers", "images/s", None));
    out.push_str("<table><thead><tr><th>workers</th><th>images/s</th><th>times the first</th>");
    out.push_str("<th>MB/s</th><th>bottleneck</th></tr></thead><tbody>\n");
    let first = report.runs[0].images_per_s.max(f64::MIN_POSITIVE);
    for run in &report.runs {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{:.2}</td><td>{}</td><td class=\"word\">{}</td></tr>",
            run.workers,
            count(run.images_per_s),
            run.images_per_s / first,
            count(run.megabytes_per_s),
            run.verdict.bottleneck,
        );
    }
    out.push_str("</tbody></table>\n</section>\n");
}

fn stage_bars(report: &Report, out: &mut String) {
    let bars: Vec<Bar> = report
        .runs
        .iter()
        .map(|run| Bar {
            label: workers(run.workers),
            parts: STAGES
                .iter()
                .filter_map(|stage| run.stages.get(stage.name()).map(|time| (stage.name(), time)))
                .map(|(class, time)| Part { class, value: time.wall_ms_per_image })
                .collect(),
        })
        .collect();
    out.push_str("<section>\n<h2>Where the workers' time goes</h2>\n<p class=\"legend\">");
    for stage in STAGES {
        let _ = write!(out, "<span class=\"key {0}\"></span>{0} ", stage.name());
    }
    out.push_str("</p>\n");
    out.push_str(&plot::bars(&bars, "ms of a worker an image"));
    out.push_str(
        "<p class=\"note\"><b>get</b> is waiting for samples, <b>put</b> waiting for room: who \
         waits is not the bottleneck.</p>\n</section>\n",
    );
}

fn section(run: &Run, out: &mut String) {
    let _ = writeln!(
        out,
        "<section>\n<h2>{}: {} images/s</h2>\n<p>{}</p>",
        escape(&workers(run.workers)),
        count(run.images_per_s),
        escape(&run.verdict.text),
    );
    if run.series.len() > 1 {
        let points = run.series.clone();
        let line = [Line { name: "images/s", class: "measured", points, dots: false }];
        out.push_str("<h3>Images a second over time</h3>\n");
        let measured = [0.0, run.seconds];
        // A run's records have no warm-up to tell apart.
        let shade = (run.mode != "train").then_some(measured);
        out.push_str(&plot::lines(&line, "seconds", "images/s", shade));
    }
    stage_table(run, out);
    channel_tables(run, out);
    operations(run, out);
    remarks(run, out);
    out.push_str("</section>\n");
}

fn stage_table(run: &Run, out: &mut String) {
    out.push_str("<h3>Stages of a worker</h3>\n<table><thead><tr><th>stage</th>");
    out.push_str("<th>ms an image</th><th>on a CPU</th><th>of the time</th></tr></thead><tbody>\n");
    for stage in STAGES {
        let Some(time) = run.stages.get(stage.name()) else { continue };
        let _ = writeln!(
            out,
            "<tr><td class=\"word\"><span class=\"key {0}\"></span>{0}</td><td>{1:.3}</td>\
             <td>{2:.3}</td><td>{3}</td></tr>",
            stage.name(),
            time.wall_ms_per_image,
            time.cpu_ms_per_image,
            percent(time.share),
        );
    }
    out.push_str("</tbody></table>\n");
}

fn channel_tables(run: &Run, out: &mut String) {
    if run.channels.is_empty() {
        return;
    }
    out.push_str("<h3>Waits at the channels</h3>\n<div class=\"grid\">\n");
    for channel in CHANNELS {
        let Some(times) = run.channels.get(channel.name()) else { continue };
        for (end, waits) in [("put", &times.put), ("get", &times.get)] {
            let _ = write!(
                out,
                "<figure><figcaption>{} <b>{end}</b> ({})</figcaption>\n{}</figure>\n",
                channel.name(),
                HumanCount(waits.count),
                plot::histogram(&waits.histogram),
            );
        }
    }
    out.push_str("</div>\n<table><thead><tr><th>channel</th><th>found</th><th>of</th>");
    out.push_str("<th>put p50</th><th>p90</th><th>p99</th>");
    out.push_str("<th>get p50</th><th>p90</th><th>p99</th></tr></thead><tbody>\n");
    for channel in CHANNELS {
        if let Some(times) = run.channels.get(channel.name()) {
            channel_row(channel.name(), times, out);
        }
    }
    out.push_str("</tbody></table>\n");
}

fn channel_row(name: &str, times: &ChannelTimes, out: &mut String) {
    let _ = write!(
        out,
        "<tr><td class=\"word\">{name}</td><td>{:.1}</td><td>{}</td>",
        times.occupancy, times.capacity
    );
    for end in [&times.put, &times.get] {
        for micros in [end.p50, end.p90, end.p99] {
            let _ = write!(out, "<td>{}</td>", plot::micros(micros));
        }
    }
    out.push_str("</tr>\n");
}

fn operations(run: &Run, out: &mut String) {
    if run.ops.is_empty() {
        return;
    }
    let mut ops: Vec<(&String, &f64)> = run.ops.iter().collect();
    ops.sort_by(|a, b| b.1.total_cmp(a.1));
    let bars: Vec<Bar> = ops
        .into_iter()
        .map(|(name, micros)| Bar {
            label: name.clone(),
            parts: vec![Part { class: "views", value: *micros }],
        })
        .collect();
    out.push_str("<h3>Operations of the views, measured apart</h3>\n");
    out.push_str(&plot::bars(&bars, "us an image, all views together"));
}

fn remarks(run: &Run, out: &mut String) {
    let mut rows = vec![
        ("measured", format!("{:.1} s, {} images", run.seconds, HumanCount(run.images))),
        ("parts of that time", windows(run)),
        ("consumer waited", percent(run.consumer.wait_share)),
        ("dispatcher busy", percent(run.dispatcher_busy)),
    ];
    if run.slabs.bytes > 0 {
        let bytes = HumanBytes(run.slabs.bytes as u64);
        let text = format!("{} of {bytes}, reused {} times", run.slabs.count, run.slabs.reuses);
        rows.push(("slabs", text));
    }
    if !run.channels.is_empty() {
        let (major, minor) = (HumanCount(run.page_faults.major), HumanCount(run.page_faults.minor));
        rows.push(("page faults", format!("{major} major, {minor} minor")));
        rows.push(("from the disk", HumanBytes(run.disk_bytes).to_string()));
    }
    if let Some(allocations) = run.allocations_per_image {
        rows.push(("allocations an image", format!("{allocations:.1}")));
    }
    if run.bad_samples > 0 {
        rows.push(("bad samples replaced", HumanCount(run.bad_samples).to_string()));
    }
    out.push_str("<dl class=\"facts\">\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    out.push_str("</dl>\n");
}

fn windows(run: &Run) -> String {
    let rates: Vec<String> = run.windows.iter().map(|rate| count(*rate)).collect();
    format!("{} images/s", rates.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_names_cannot_become_markup() {
        assert_eq!(
            escape("<script>'a' & \"b\"</script>"),
            "&lt;script&gt;&#39;a&#39; &amp; &quot;b&quot;&lt;/script&gt;"
        );
    }
}
