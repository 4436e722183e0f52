//! A timeline in the JSON form that Chrome's `about:tracing` and Perfetto read: a process for each
//! run, a track for each thread, a box for each span.

use std::io::{self, Write};

use detco_shards::trace::Track;
use serde_json::json;

/// Spans in a timeline, at most: a hundred bytes each in the file, forty in memory.
pub const SPANS_MAX: usize = 400_000;

/// One run's tracks.
#[derive(Debug)]
pub struct Process {
    /// The name of the run.
    pub name: String,
    /// Its threads.
    pub tracks: Vec<Track>,
}

impl Process {
    /// Number of spans that were left out.
    pub fn cut(&self) -> u64 {
        self.tracks.iter().map(|track| track.cut).sum()
    }
}

/// Writes the timeline.
///
/// # Errors
/// The writer's.
pub fn write(processes: &[Process], out: &mut impl Write) -> io::Result<()> {
    let cut: u64 = processes.iter().map(Process::cut).sum();
    let about = json!({ "detco": env!("CARGO_PKG_VERSION"), "spans_left_out": cut });
    writeln!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{about},\"traceEvents\":[")?;
    let mut separator = "";
    for (pid, process) in (1..).zip(processes) {
        let name = json!({ "name": process.name });
        writeln!(
            out,
            "{separator}{{\"ph\":\"M\",\"pid\":{pid},\"name\":\"process_name\",\"args\":{name}}}"
        )?;
        separator = ",";
        for (tid, track) in (1..).zip(&process.tracks) {
            let name = json!({ "name": track.name, "spans_left_out": track.cut });
            writeln!(
                out,
                ",{{\"ph\":\"M\",\"pid\":{pid},\"tid\":{tid},\"name\":\"thread_name\",\"args\":{name}}}"
            )?;
            for span in &track.spans {
                // Names are constants of the program: nothing in them to escape.
                writeln!(
                    out,
                    ",{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"name\":\"{}\",\"ts\":{:.3},\
                     \"dur\":{:.3},\"args\":{{\"of\":{}}}}}",
                    span.name,
                    span.start as f64 / 1e3,
                    span.nanos as f64 / 1e3,
                    span.of
                )?;
            }
        }
    }
    writeln!(out, "]}}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use detco_shards::trace::Span;

    #[test]
    fn the_file_is_json_with_a_track_a_thread() {
        let span = Span { name: "decode", start: 1500, nanos: 2_000_250, of: 7 };
        let track = |name: &str, cut| Track { name: name.into(), spans: vec![span; 2], cut };
        let tracks = vec![track("worker \"0\"", 0), track("consumer", 3)];
        let processes = [
            Process { name: "1 worker".into(), tracks: tracks.clone() },
            Process { name: "2 workers".into(), tracks },
        ];
        let mut text = Vec::new();
        write(&processes, &mut text).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 * (1 + 2 * 3));
        assert_eq!(json["otherData"]["spans_left_out"], 6);
        assert_eq!(events[1]["args"]["name"], "worker \"0\"");
        assert_eq!((&events[2]["ts"], &events[2]["dur"]), (&json!(1.5), &json!(2000.25)));
    }
}
