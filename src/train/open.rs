//! Opening a run: everything from an agreed plan to the first batch.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{LoaderOptions, Views};
use tch::Device;

use super::error::{TrainError, io_error};
use super::knn::Monitor;
use super::plan::{Plan, Resumed};
use super::process::{device, lock, micro_batches};
use super::rates::{Mark, Window};
use super::resume::edits;
use super::samples::cut_lines;
use super::save::tell_room;
use super::world::{Entrance, World};
use super::{Decoder, Lead, Run};
use crate::checkpoint;
use crate::config::{self, Config};
use crate::console::plural;
use crate::data;
use crate::device;
use crate::dist::Collective;
use crate::dist::c10d::C10d;
use crate::dist::local::Local;
use crate::dist::world::Launcher;
use crate::feed::{self, Feed};
use crate::metrics::{self, Metrics, Progress};
use crate::model::Model;
use crate::optim::Sgd;
use crate::schedule::steps_in_all;
use crate::shim::c10d::Member;
use crate::weights;

impl Run {
    pub(super) fn open(
        plan: Plan,
        entrance: &mut Entrance,
        stop: &Arc<AtomicBool>,
        decoder: Decoder<'_>,
    ) -> Result<Run, TrainError> {
        let Plan { folder, config: saved_config, set, state, saved } = plan;
        let spec = entrance.rendezvous.as_ref().map(|rendezvous| rendezvous.spec().clone());
        let member = spec.as_ref().map_or(Member { rank: 0, size: 1 }, |spec| spec.member);
        let (local_rank, local_size) =
            spec.as_ref().map_or((0, 1), |spec| (spec.local_rank, spec.local_size));
        let by_slurm = spec.is_some_and(|spec| spec.launcher == Launcher::Slurm);
        let begun_ranks = state.as_ref().map_or(member.size, |state| state.ranks);
        let mut config = saved_config.clone();
        config.train.accumulate = micro_batches(&config, begun_ranks, member.size)?;
        let found = device(config.train.device, member, local_rank, by_slurm)?;
        let device = found.device;
        let decoding = decoder(&config, &found)?;
        device::set_numerics(&config.train)?;
        if config.train.threads > 0 {
            tch::set_num_threads(config.train.threads);
        }
        device::check_threads().map_err(TrainError::Threads)?;
        let order = data::order(config.data.window, &set, config.train.batch as u64, config.seed)?;
        fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
        let step = state.as_ref().map_or(0, |state| state.step);
        let cursor = state.as_ref().map_or(Cursor::default(), |state| state.cursor);
        let resumed = state.is_some();
        let collapsing = state.map_or_else(Vec::new, |state| state.collapsing);
        let (saved, damaged, lock) = match saved {
            None => (None, Vec::new(), None),
            Some(Resumed { saved, damaged, lock }) => (Some(saved), damaged, Some((step, lock))),
        };
        if member.rank == 0 {
            tell_room(&config, &folder, resumed)?;
        }
        let open_lead = || Lead::open(&folder, &saved_config, order.steps_per_epoch(), lock);
        let lead = (member.rank == 0).then(open_lead).transpose()?;
        if resumed {
            cut_lines(&folder, member, step)?;
        }

        let mut model = Model::new(&config, device)?;
        let mut sgd = Sgd::of(model.query.parameters(), &config.optim);
        if let Some(saved) = &saved {
            model.load(&saved.model_tensors()?)?;
            sgd.load(&saved.optim_tensors()?)?;
            if !damaged.is_empty() {
                checkpoint::set_aside(&folder, &damaged, saved)?;
            }
        } else if lead.is_some() {
            start_from(&mut model, &config.model)?;
        }
        if let Some(rendezvous) = entrance.rendezvous.take() {
            let world = C10d::new(rendezvous, device, &config.dist, Arc::clone(stop))?;
            let world = entrance.world.insert(Box::new(world));
            share_state(world.as_ref(), &mut model, &sgd)?;
        }
        let options = loader_options(&config, order.clone(), cursor, member, local_size);
        let decoded_by = decoding.to_string();
        let copied_by = match device {
            Device::Cuda(index) => Some(index as u32),
            _ => None,
        };
        let source = decoding.start(&set, options, feed::share(&config), copied_by)?;
        let feed = Feed::new(&config, device, &source, member.size)?;
        let world = entrance.world.take().map_or(World::One(Local), World::Several);
        let window = Window::from(Mark::now(&source, world.bytes_sent(), step));
        let run = Run {
            folder,
            config,
            feed,
            saved_config,
            begun_ranks,
            world,
            found,
            set,
            order,
            source,
            model,
            sgd,
            lead,
            cursor,
            step,
            under_way: None,
            replaced: 0,
            stop: false,
            opened_at: step,
            collapsing,
            monitor_owed: false,
            window,
        };
        if run.lead.is_some() {
            run.say_hello(resumed, &decoded_by);
        } else if local_rank == 0 {
            // Another machine may have what this one lacks.
            note!("rank {}: decoding with {decoded_by}", run.world.rank());
        }
        Ok(run)
    }

    fn say_hello(&self, resumed: bool, decoded_by: &str) {
        let ranks = match (self.world.size(), self.config.train.accumulate) {
            (1, 1) => String::new(),
            (1, parts) => format!(", in {parts} micro-batches"),
            (ranks, 1) => format!(", {ranks} ranks"),
            (ranks, parts) => format!(", {ranks} ranks of {parts} micro-batches"),
        };
        note!(
            "{} {}: {}, {} an epoch, batch {}{ranks}, on {}, decoding with {decoded_by}",
            if resumed { "resuming" } else { "training in" },
            self.folder.display(),
            plural(self.set.len(), "sample"),
            plural(self.order.steps_per_epoch(), "step"),
            self.config.train.batch,
            self.found.describe(),
        );
        for warning in data::oddities(&self.config, &self.set, &self.order) {
            note!("warning: {warning}");
        }
    }
}

impl Lead {
    pub(super) fn open(
        folder: &Path,
        config: &Config,
        steps_per_epoch: u64,
        resumed: Option<(u64, File)>,
    ) -> Result<Lead, TrainError> {
        let (resumed, lock) = match resumed {
            None => {
                let lock = lock(folder)?;
                // Another process may have begun and ended here meanwhile.
                if !checkpoint::list(folder)?.is_empty() {
                    return Err(TrainError::RunExists { run: folder.to_path_buf() });
                }
                (None, lock)
            }
            Some((step, lock)) => (Some(step), lock),
        };
        let path = folder.join("config.toml");
        if let Some(edits) = resumed.and_then(|_| edits(&path, config)) {
            note!("warning: {}: {edits}", path.display());
            note!("warning: this file is a copy that no run reads; it is written anew");
        }
        checkpoint::write_whole(&path, config.to_toml().as_bytes())?;
        let steps = steps_in_all(config, steps_per_epoch);
        let begin = match resumed {
            None => metrics::Start::New,
            Some(step) => metrics::Start::Resume { step },
        };
        let metrics = Metrics::open(folder, begin)?;
        let batch = config.train.batch as u64;
        let progress = Progress::new(metrics::Plan { epochs: config.train.epochs, steps, batch });
        Ok(Lead { metrics, progress, monitor: Monitor::open(config)?, _lock: lock })
    }
}

/// Starts both encoders' backbones from the file that the configuration names, if it names one.
pub(crate) fn start_from(model: &mut Model, config: &config::Model) -> Result<(), TrainError> {
    let Some(file) = &config.init else { return Ok(()) };
    let backbone = weights::read_backbone(file, config.init_prefix.as_deref())?;
    let refused = |source| TrainError::Init { file: file.clone(), source: Box::new(source) };
    model.start_from(&backbone.tensors).map_err(refused)?;
    note!("the backbone starts from {}: {}", file.display(), backbone.describe());
    Ok(())
}

/// Rank 0's weights, statistics, queues and momentum on all ranks.
fn share_state(world: &dyn Collective, model: &mut Model, sgd: &Sgd) -> Result<(), TrainError> {
    let mut tensors = model.tensors();
    for (_, tensor) in tensors.iter_mut().chain(&mut sgd.tensors()) {
        world.broadcast(std::slice::from_mut(tensor))?;
    }
    Ok(model.load(&tensors)?) // for the queues' pointer, which is no tensor of the model
}

fn loader_options(
    config: &Config,
    order: Order,
    start: Cursor,
    member: Member,
    local_size: usize,
) -> LoaderOptions {
    // The ranks of a machine share its cores.
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let workers = match config.data.workers {
        0 if local_size > 1 => (cores() / local_size).max(1),
        workers => workers,
    };
    LoaderOptions {
        views: Views::Recipe(config.training_views()),
        labels: false,
        seed: config.seed,
        order,
        start,
        epochs: config.train.epochs,
        rank: (member.rank as u32, member.size as u32),
        workers,
        batches_ahead: config.data.batches_ahead,
        reduce: config.data.reduce,
        on_bad_sample: config.data.on_bad_sample,
        bad_share_max: config.data.bad_share_max,
        bad_run_max: config.data.bad_run_max,
        trace: None,
        handicap: None,
    }
}
