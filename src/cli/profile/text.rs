//! The report for a terminal.

use detco_shards::stats::{CHANNELS, STAGES};
use indicatif::{HumanBytes, HumanCount};

use super::Args;
use crate::console::plural;
use crate::profile::timeline::Process;
use crate::profile::verdict::{count, percent};
use crate::profile::{Report, Run, Size};
use crate::source::who_decoded;

/// The report for a terminal.
pub(super) fn text(report: &Report, processes: &[Process], args: &Args) -> String {
    let mut out = head(report);
    for run in &report.runs {
        out.push('\n');
        table(run, &mut out);
        out += &too_small_to_be_cold(run).filter(|_| report.settings.cold).unwrap_or_default();
    }
    if report.runs.len() > 1 {
        out.push('\n');
        scaling(report, &mut out);
    }
    let cut: u64 = processes.iter().map(Process::cut).sum();
    if cut > 0 {
        out += &format!("\nthe timeline leaves out {} later spans\n", HumanCount(cut));
    }
    for path in [&args.json, &args.html, &args.trace].into_iter().flatten() {
        out += &format!("\nwritten: {}", path.display());
    }
    if args.json.is_some() || args.html.is_some() || args.trace.is_some() {
        out.push('\n');
    }
    out += &format!("\n{}\n", report.verdict.text);
    for warning in &report.warnings {
        out += &format!("warning: {warning}\n");
    }
    out
}

fn head(report: &Report) -> String {
    let settings = &report.settings;
    let mut out = match (&report.data.run, &report.data.size) {
        (Some(run), _) => {
            format!("{}: batch {}, {}\n", run.display(), settings.batch, settings.recipe)
        }
        (None, size) => {
            let about = size.as_ref().map_or(String::new(), amount);
            let cache = if settings.cold { "cold" } else { "warm" };
            let spec = report.data.spec.join(" ");
            let (batch, recipe) = (settings.batch, &settings.recipe);
            format!("{spec}: {about}; page cache {cache}; batch {batch}, {recipe}\n")
        }
    };
    if let Some(machine) = &report.machine {
        let unknown = || "unknown".to_owned();
        let decoding = report.runs.first().map_or(machine.decoder, |run| &run.decoding);
        let memory = machine.memory_bytes.map_or_else(unknown, |b| HumanBytes(b).to_string());
        out += &format!(
            "{} of {}, {}, {memory} of memory, {}; decoding with {decoding}\n",
            plural(machine.cores as u64, "core"),
            machine.cpu.clone().unwrap_or_else(unknown),
            machine.simd,
            machine.file_system.clone().unwrap_or_else(unknown),
        );
    }
    if let Some(rate) = settings.consumer_images_per_s {
        out += &format!("consumer: takes {} images/s", count(rate));
        if let Some([device, image]) = settings.consumer_gflops {
            out += &format!(", {} GFLOP/s at {image:.1} GFLOP an image", count(device));
        }
        out.push('\n');
    }
    out
}

fn amount(size: &Size) -> String {
    let of = match size.shards_of {
        of if of == size.shards => String::new(),
        of => format!(" of {}", HumanCount(of)),
    };
    let shards = plural(size.shards, "shard");
    format!("{} samples in {shards}{of}, {}", HumanCount(size.samples), HumanBytes(size.bytes))
}

/// One run's figures.
fn table(run: &Run, out: &mut String) {
    let low = run.windows.iter().copied().fold(f64::INFINITY, f64::min);
    let high = run.windows.iter().copied().fold(0.0, f64::max);
    *out += &format!(
        "{}, {}, {:.1} s: {} images/s ({} to {}), {} MB/s\n",
        run.mode,
        plural(run.workers as u64, "worker"),
        run.seconds,
        count(run.images_per_s),
        count(low),
        count(high),
        count(run.megabytes_per_s),
    );
    if let Some(counts) = &run.decoded {
        *out += &format!("  decoded: {}\n", who_decoded(counts));
    }
    *out += "  stage       ms an image      on a CPU    of the time\n";
    for stage in STAGES {
        let Some(time) = run.stages.get(stage.name()) else { continue };
        *out += &format!(
            "  {:<8} {:>14.3} {:>13.3} {:>14}\n",
            stage.name(),
            time.wall_ms_per_image,
            time.cpu_ms_per_image,
            percent(time.share),
        );
    }
    if !run.channels.is_empty() {
        *out += "  channel    found   of   put waits p50     p90     p99   get waits p50     p90     p99\n";
    }
    for channel in CHANNELS {
        let Some(times) = run.channels.get(channel.name()) else { continue };
        *out += &format!("  {:<8} {:>7.1} {:>4}", channel.name(), times.occupancy, times.capacity);
        for end in [&times.put, &times.get] {
            *out +=
                &format!(" {:>15} {:>7} {:>7}", micros(end.p50), micros(end.p90), micros(end.p99));
        }
        out.push('\n');
    }
    if !run.ops.is_empty() {
        *out += "  operations measured apart, us an image:";
        let mut ops: Vec<_> = run.ops.iter().collect();
        ops.sort_by(|a, b| b.1.total_cmp(a.1));
        for (at, (name, micros)) in ops.into_iter().enumerate() {
            *out += if at % 5 == 0 { "\n    " } else { "  " };
            *out += &format!("{name} {micros:.0}");
        }
        out.push('\n');
    }
    remarks(run, out);
}

/// What came from URLs.
fn fetched(run: &Run, out: &mut String) {
    let Some(fetched) = &run.fetched else { return };
    let waits = &fetched.waits;
    *out += &format!(
        "  fetched {} MB/s: {}, {:.1} at a time, {} made again; a shard was waited for {} of the \
         time ({} waits, p50 {}, p99 {})\n",
        count(fetched.megabytes_per_s),
        plural(fetched.shards, "shard"),
        fetched.at_a_time,
        plural(fetched.failures, "attempt"),
        percent(fetched.wait_share),
        waits.count,
        micros(waits.p50),
        micros(waits.p99),
    );
}

fn remarks(run: &Run, out: &mut String) {
    fetched(run, out);
    let mut parts = vec![format!("consumer waited {}", percent(run.consumer.wait_share))];
    parts.push(format!("dispatcher busy {}", percent(run.dispatcher_busy)));
    if run.slabs.bytes > 0 {
        let (slabs, bytes) = (run.slabs, HumanBytes(run.slabs.bytes as u64));
        parts.push(format!("{} slabs of {bytes}, reused {} times", slabs.count, slabs.reuses));
    }
    if !run.channels.is_empty() {
        let faults = run.page_faults;
        let (major, minor) = (HumanCount(faults.major), HumanCount(faults.minor));
        parts.push(format!("{major} major and {minor} minor page faults"));
        parts.push(format!("{} from the disk", HumanBytes(run.disk_bytes)));
    }
    if let Some(allocations) = run.allocations_per_image {
        parts.push(format!("{allocations:.1} allocations an image"));
    }
    if run.bad_samples > 0 {
        parts.push(format!("{} bad and replaced", plural(run.bad_samples, "sample")));
    }
    for pair in parts.chunks(3) {
        *out += &format!("  {}\n", pair.join("; "));
    }
}

/// A time in microseconds with its unit, in seven characters.
fn micros(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{us:.2} us"),
        us if us < 1e3 => format!("{us:.0} us"),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

fn scaling(report: &Report, out: &mut String) {
    *out += "workers  images/s   times the first   bottleneck\n";
    let first = report.runs.first().map_or(1.0, |run| run.images_per_s).max(f64::MIN_POSITIVE);
    for run in &report.runs {
        *out += &format!(
            "{:>7} {:>9} {:>17.2}   {}\n",
            run.workers,
            count(run.images_per_s),
            run.images_per_s / first,
            run.verdict.bottleneck,
        );
    }
}

/// A note for a run with a cold cache that was served from memory all the same.
fn too_small_to_be_cold(run: &Run) -> Option<String> {
    let came = run.megabytes_per_s * 1e6 * run.seconds;
    let (came, disk) = (came as u64, run.disk_bytes);
    (disk < came / 2).then(|| {
        format!(
            "  note: of {} that came in {} were read from the disk meanwhile: the rest was in memory by \
             then, read ahead or while warming up. This is not what the disk gives: take more data\n",
            HumanBytes(came),
            HumanBytes(disk),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let shown = [0.25, 12.0, 3_400.0, 2.5e6].map(micros);
        assert_eq!(shown, ["0.25 us", "12 us", "3 ms", "2.5 s"]);
    }
}
