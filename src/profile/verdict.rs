//! The verdict: from counters to the bottleneck and a number to act on.
//!
//! Pure: numbers in, a verdict out. Whoever waits is not the bottleneck. If the workers wait more than
//! the consumer, the consumer is the bottleneck; if both wait, it is what stands between them; otherwise it
//! is the workers' most expensive stage.

use crate::console::plural;
use detco_shards::stats::{STAGES, Stage};
use serde::Serialize;

/// A consumer that waits for a smaller share of its time is satisfied.
pub const CONTENT: f64 = 0.05;
/// Workers that wait for more than this share of their time do not limit a consumer that waits too.
const IDLE: f64 = 0.25;
/// A dispatcher that works for more than this share of its time is the bottleneck of idle workers.
const BUSY: f64 = 0.5;
/// When other programs take more than this share of the workers' time, the verdict says so.
const DISTURBED: f64 = 0.2;

/// The consumer of the batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Consumer {
    /// Takes each batch at once.
    Eager,
    /// A simulated trainer that could take this many images a second.
    Simulated {
        /// Images a second.
        images_per_s: f64,
    },
    /// A training run.
    Training,
}

/// The counters of a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evidence {
    /// Threads that read, decode and render.
    pub workers: usize,
    /// Cores that this process may use.
    pub cores: usize,
    /// Images a second.
    pub images_per_s: f64,
    /// Compressed megabytes a second.
    pub megabytes_per_s: f64,
    /// Milliseconds of a worker per image, in the order of [`STAGES`].
    pub wall_ms: [f64; STAGES.len()],
    /// Of those, on a CPU.
    pub cpu_ms: [f64; STAGES.len()],
    /// Share of its time that the dispatcher worked, 0 to 1.
    pub dispatcher_busy: f64,
    /// Share of its time that the dispatcher waited for a shard from a URL, 0 to 1.
    pub shard_wait: f64,
    /// Whether anything was read from a disk or a network; `None` where that was not counted.
    pub from_disk: Option<bool>,
    /// The consumer of the batches.
    pub consumer: Consumer,
    /// Share of its time that the consumer waited for a batch, 0 to 1.
    pub consumer_wait: f64,
}

/// The bottleneck of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// `read`, `decode`, `views` or `put`; `consumer`; `dispatch` (the one thread that hands out
    /// samples and reads ahead); `fetch` (shards from URLs); `slabs` (too few batches may be ahead).
    pub bottleneck: &'static str,
    /// One or two sentences with a number to act on.
    pub text: String,
    /// Cost of the bottleneck per image, in milliseconds of an undisturbed worker.
    pub stage_ms: Option<f64>,
    /// Cost of all stages per image.
    pub total_ms: f64,
    /// Images/s of the workers if they never waited.
    pub potential_images_per_s: f64,
    /// The target in images/s for `cores_needed`.
    pub target_images_per_s: Option<f64>,
    /// Cores needed for the target.
    pub cores_needed: Option<u64>,
}

impl Evidence {
    fn wall(&self, stage: Stage) -> f64 {
        self.wall_ms[stage as usize]
    }

    /// Share of their time that the workers waited for a sample.
    fn idle(&self) -> f64 {
        self.wall(Stage::Get) / self.wall_ms.iter().sum::<f64>().max(f64::MIN_POSITIVE)
    }

    /// Ratio of wall time to CPU time in the stages that do not wait for a disk: more workers than cores, or
    /// other programs, stretch all stages by it.
    fn stretch(&self) -> f64 {
        let computing = [Stage::Decode, Stage::Views];
        let wall: f64 = computing.iter().map(|stage| self.wall(*stage)).sum();
        let cpu: f64 = computing.iter().map(|stage| self.cpu_ms[*stage as usize]).sum();
        if cpu > 0.0 { (wall / cpu).max(1.0) } else { 1.0 }
    }

    /// Cost of a stage per image in milliseconds, undisturbed. A thread queues for a core in proportion to
    /// the CPU time it needs; any further waiting belongs to the stage.
    fn cost(&self, stage: Stage) -> f64 {
        let cpu = self.cpu_ms[stage as usize];
        (self.wall(stage) - (self.stretch() - 1.0) * cpu).max(cpu)
    }

    /// CPU milliseconds an image.
    fn cpu(&self) -> f64 {
        self.cpu_ms.iter().sum()
    }

    /// Images/s of workers that never wait for a sample.
    fn potential(&self) -> f64 {
        self.images_per_s / (1.0 - self.idle()).max(1e-3)
    }

    /// Cores needed for this many images/s.
    fn cores_for(&self, images_per_s: f64) -> u64 {
        (images_per_s * self.cpu() / 1e3).ceil().max(1.0) as u64
    }

    /// The target in images/s: what the consumer could take, or else the next round number from twice the
    /// present rate on.
    fn target(&self) -> f64 {
        match self.consumer {
            Consumer::Simulated { images_per_s } => images_per_s,
            Consumer::Training => self.images_per_s / (1.0 - self.consumer_wait).max(0.01),
            Consumer::Eager => round_up(2.0 * self.images_per_s),
        }
    }

    /// Finds the bottleneck.
    pub fn verdict(&self) -> Verdict {
        let satisfied = self.consumer_wait < CONTENT || self.idle() > self.consumer_wait;
        let with_consumer = !matches!(self.consumer, Consumer::Eager);
        let starved = self.shard_wait > IDLE && self.shard_wait > self.dispatcher_busy;
        if starved && (!with_consumer || self.consumer_wait >= CONTENT) {
            return self.fetch_verdict();
        }
        if with_consumer && satisfied {
            return self.consumer_verdict();
        }
        if self.idle() > IDLE {
            return self.between_verdict();
        }
        let working = [Stage::Read, Stage::Decode, Stage::Views, Stage::Put];
        // The later of two equals: `max_by` keeps it, and there is always one.
        let worst = working.into_iter().max_by(|a, b| self.cost(*a).total_cmp(&self.cost(*b)));
        self.stage_verdict(worst.unwrap_or(Stage::Read))
    }

    fn with(&self, bottleneck: &'static str, text: String) -> Verdict {
        let working = [Stage::Read, Stage::Decode, Stage::Views, Stage::Put];
        Verdict {
            bottleneck,
            text,
            stage_ms: None,
            total_ms: working.into_iter().map(|stage| self.cost(stage)).sum(),
            potential_images_per_s: self.potential(),
            target_images_per_s: None,
            cores_needed: None,
        }
    }

    fn consumer_verdict(&self) -> Verdict {
        let who = match self.consumer {
            Consumer::Training => "The training step",
            Consumer::Simulated { .. } | Consumer::Eager => "The consumer",
        };
        let text = format!(
            "{who} is the bottleneck: it took {} images/s and waited for data {} of the time. {} \
             could feed {}, {:.1} times as much; {} would do.",
            count(self.images_per_s),
            percent(self.consumer_wait),
            plural(self.workers as u64, "worker"),
            count(self.potential()),
            self.potential() / self.images_per_s.max(f64::MIN_POSITIVE),
            plural(self.cores_for(self.images_per_s), "core"),
        );
        Verdict {
            target_images_per_s: Some(self.images_per_s),
            cores_needed: Some(self.cores_for(self.images_per_s)),
            ..self.with("consumer", text)
        }
    }

    /// The verdict if shards from URLs come too late.
    fn fetch_verdict(&self) -> Verdict {
        let faster = self.potential() / self.images_per_s.max(f64::MIN_POSITIVE);
        let text = format!(
            "Fetching shards is the bottleneck: workers waited {} of their time, and the next shard \
             was not there {} of it. {} MB/s came; the workers would take {}. A larger data.fetches \
             helps where the line is not full.",
            percent(self.idle()),
            percent(self.shard_wait),
            count(self.megabytes_per_s),
            count(self.megabytes_per_s * faster),
        );
        self.with("fetch", text)
    }

    /// The verdict if both workers and consumer wait.
    fn between_verdict(&self) -> Verdict {
        let waited = percent(self.idle());
        if self.dispatcher_busy > BUSY {
            let text = format!(
                "Handing out samples is the bottleneck: workers waited for it {waited} of their \
                 time, and the one thread that orders samples and reads ahead was busy {} of its \
                 own. It allows {} images/s.",
                percent(self.dispatcher_busy),
                count(self.images_per_s / self.dispatcher_busy),
            );
            return self.with("dispatch", text);
        }
        let text = format!(
            "Too few batches may be ahead: workers waited for a free slab {waited} of their time \
             while the consumer waited as well. With a larger data.batches_ahead they would give \
             up to {} images/s.",
            count(self.potential()),
        );
        self.with("slabs", text)
    }

    fn stage_verdict(&self, stage: Stage) -> Verdict {
        let what = match stage {
            Stage::Get | Stage::Put => "Handing batches on is",
            Stage::Read => "Reading is",
            Stage::Decode => "Decoding is",
            Stage::Views => "Views are",
        };
        let (cost, target, cores) = (self.cost(stage), self.target(), self.cores);
        let mut verdict = self.with(stage.name(), String::new());
        verdict.stage_ms = Some(cost);
        verdict.target_images_per_s = Some(target);
        let head =
            format!("{what} the bottleneck: {:.2} of {:.2} ms an image", cost, verdict.total_ms);
        let waiting = cost - self.cpu_ms[stage as usize];
        if waiting > 0.5 * cost && stage == Stage::Read && self.from_disk == Some(false) {
            verdict.text = format!(
                "{head}, of which {waiting:.2} ms is waiting, though nothing came from a disk: \
                 other programs held the cores. {} MB/s came from memory.",
                count(self.megabytes_per_s),
            );
            return verdict;
        }
        if waiting > 0.5 * cost {
            // Waiting takes no core: more workers wait side by side.
            let workers = (target * verdict.total_ms / 1e3).ceil().max(1.0) as u64;
            verdict.text = format!(
                "{head}, of which {waiting:.2} ms is waiting; {} MB/s came in. {} would feed {} \
                 images/s if the source gives {} MB/s; you have {}.",
                count(self.megabytes_per_s),
                plural(workers, "worker"),
                count(target),
                count(self.megabytes_per_s * target / self.images_per_s.max(f64::MIN_POSITIVE)),
                self.workers,
            );
            return verdict;
        }
        let needed = self.cores_for(target);
        verdict.cores_needed = Some(needed);
        let used = if self.workers < cores {
            format!("{cores} and use {}", self.workers)
        } else {
            cores.to_string()
        };
        verdict.text = format!(
            "{head}. {} would feed {} images/s; you have {used}.",
            plural(needed, "core"),
            count(target),
        );
        let lost = 1.0 - 1.0 / self.stretch();
        if self.workers <= cores && lost > DISTURBED {
            verdict.text +=
                &format!(" Other programs took {} of the workers' time.", percent(lost));
        }
        verdict
    }
}

/// The next of 1, 2, 5, 10, 20, ... from this number on.
fn round_up(number: f64) -> f64 {
    let power = 10f64.powf(number.max(1.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|round| *round >= number).unwrap_or(number)
}

/// `12,345`; below 10 with a decimal.
pub fn count(number: f64) -> String {
    if number < 10.0 {
        return format!("{number:.1}");
    }
    indicatif::HumanCount(number.round() as u64).to_string()
}

/// `5 %`; below 1 % with a decimal.
pub fn percent(share: f64) -> String {
    let share = share * 100.0;
    if share > 0.0 && share < 0.95 { format!("{share:.1} %") } else { format!("{share:.0} %") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two workers on two cores, read 0.1, decode 1.5, views 2.3 ms: 512 images/s.
    fn evidence() -> Evidence {
        Evidence {
            workers: 2,
            cores: 2,
            images_per_s: 512.0,
            megabytes_per_s: 56.0,
            wall_ms: [0.0, 0.1, 1.5, 2.3, 0.0],
            cpu_ms: [0.0, 0.1, 1.5, 2.3, 0.0],
            dispatcher_busy: 0.01,
            shard_wait: 0.0,
            from_disk: Some(true),
            consumer: Consumer::Eager,
            consumer_wait: 1.0,
        }
    }

    fn of(wall_ms: [f64; 5], cpu_ms: [f64; 5]) -> Evidence {
        let per_worker = 1e3 / wall_ms.iter().sum::<f64>();
        Evidence { wall_ms, cpu_ms, images_per_s: 2.0 * per_worker, ..evidence() }
    }

    #[test]
    fn the_sentence_of_the_handbook() {
        let consumer = Consumer::Simulated { images_per_s: 1500.0 };
        let verdict = Evidence { consumer, consumer_wait: 0.66, ..evidence() }.verdict();
        assert_eq!(
            verdict.text,
            "Views are the bottleneck: 2.30 of 3.90 ms an image. 6 cores would feed 1,500 \
             images/s; you have 2."
        );
        assert_eq!((verdict.bottleneck, verdict.cores_needed), ("views", Some(6)));
    }

    #[test]
    fn the_costliest_stage_of_busy_workers_is_named() {
        for (wall, name, words) in [
            ([0.1, 3.0, 1.0, 1.0, 0.0], "read", "Reading is"),
            ([0.1, 1.0, 3.0, 1.0, 0.0], "decode", "Decoding is"),
            ([0.1, 1.0, 1.0, 3.0, 0.0], "views", "Views are"),
            ([0.1, 1.0, 1.0, 1.0, 3.0], "put", "Handing batches on is"),
        ] {
            let verdict = of(wall, wall).verdict();
            assert_eq!(verdict.bottleneck, name);
            assert!(verdict.text.starts_with(words), "{}", verdict.text);
            assert_eq!((verdict.stage_ms, verdict.total_ms), (Some(3.0), wall[1..].iter().sum()));
        }
    }

    #[test]
    fn waiting_for_a_disk_asks_for_workers_not_for_cores() {
        let slow = of([0.0, 6.0, 1.0, 1.0, 0.0], [0.0, 0.1, 1.0, 1.0, 0.0]);
        let verdict = Evidence { megabytes_per_s: 25.0, ..slow }.verdict();
        assert_eq!((verdict.bottleneck, verdict.cores_needed), ("read", None));
        assert!(verdict.text.contains("5.90 ms is waiting; 25 MB/s came in"), "{}", verdict.text);
        assert!(verdict.text.contains("4 workers would feed 500 images/s"), "{}", verdict.text);
    }

    #[test]
    fn waiting_without_a_disk_is_not_laid_on_one() {
        let slow = of([0.0, 0.07, 0.0, 0.0, 0.0], [0.0, 0.02, 0.0, 0.0, 0.0]);
        let verdict = Evidence { from_disk: Some(false), ..slow }.verdict();
        assert_eq!(verdict.bottleneck, "read");
        assert!(verdict.text.contains("other programs held the cores"), "{}", verdict.text);
    }

    #[test]
    fn more_workers_than_cores_do_not_look_like_a_slow_disk() {
        // Four workers on two cores: each stage takes twice its CPU time, the short read as well.
        let cpu = [0.0, 0.4, 1.5, 2.3, 0.0];
        let crowded = Evidence { workers: 4, ..of(cpu.map(|ms| ms * 2.0), cpu) };
        let verdict = crowded.verdict();
        assert_eq!(verdict.bottleneck, "views");
        assert!((verdict.total_ms - 4.2).abs() < 1e-9, "{verdict:?}");
        assert!(!verdict.text.contains("Other programs"), "{}", verdict.text);
        let disturbed = Evidence { workers: 2, ..crowded }.verdict();
        assert!(disturbed.text.ends_with("Other programs took 50 % of the workers' time."));
    }

    #[test]
    fn who_waits_is_not_the_bottleneck() {
        // The workers wait 60 % of their time, the consumer hardly.
        let idle = of([6.0, 0.1, 1.6, 2.3, 0.0], [0.0, 0.1, 1.6, 2.3, 0.0]);
        let consumer = Consumer::Simulated { images_per_s: 200.0 };
        let slow = Evidence { consumer, consumer_wait: 0.02, images_per_s: 200.0, ..idle };
        let verdict = slow.verdict();
        assert_eq!(verdict.bottleneck, "consumer");
        assert_eq!(
            verdict.text,
            "The consumer is the bottleneck: it took 200 images/s and waited for data 2 % of the \
             time. 2 workers could feed 500, 2.5 times as much; 1 core would do."
        );
        let training = Evidence { consumer: Consumer::Training, ..slow }.verdict();
        assert!(training.text.starts_with("The training step is"), "{}", training.text);
        // Both wait: what stands between them is slow.
        let starved = Evidence { consumer_wait: 0.7, ..slow };
        let busy = Evidence { dispatcher_busy: 0.9, ..starved };
        assert_eq!(busy.verdict().bottleneck, "dispatch");
        assert_eq!(starved.verdict().bottleneck, "slabs");
        assert!(starved.verdict().text.contains("batches_ahead"));
        // The one in between waits itself, for shards from elsewhere.
        let fetching = Evidence { shard_wait: 0.9, ..starved };
        assert_eq!(fetching.verdict().bottleneck, "fetch");
        assert!(fetching.verdict().text.contains("was not there 90 % of it. 56 MB/s came"));
        assert_eq!(Evidence { consumer_wait: 0.0, ..fetching }.verdict().bottleneck, "consumer");
        let eager = Evidence { consumer: Consumer::Eager, ..fetching };
        assert_eq!(eager.verdict().bottleneck, "fetch");
    }

    #[test]
    fn a_training_run_is_measured_by_what_its_step_could_take() {
        let run = Evidence { consumer: Consumer::Training, consumer_wait: 0.75, ..evidence() };
        let verdict = run.verdict();
        assert_eq!(verdict.target_images_per_s, Some(2048.0));
        assert_eq!(verdict.cores_needed, Some(8));
    }

    #[test]
    fn targets_are_round_and_numbers_readable() {
        for (number, round) in [(0.3, 1.0), (7.0, 10.0), (150.0, 200.0), (201.0, 500.0)] {
            assert_eq!(round_up(number), round);
        }
        assert_eq!(count(1234.4), "1,234");
        assert_eq!((percent(0.004), percent(0.42)), ("0.4 %".to_owned(), "42 %".to_owned()));
        // Nothing counted is no panic.
        let nothing =
            Evidence { images_per_s: 0.0, wall_ms: [0.0; 5], cpu_ms: [0.0; 5], ..evidence() };
        assert!(!nothing.verdict().text.is_empty());
    }
}
