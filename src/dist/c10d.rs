//! A world of several ranks on libtorch's own engine: NCCL between GPUs, Gloo between CPUs, and
//! DistributedDataParallel's reducer for gradients.

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::heartbeat::{Heartbeat, Limits};
use super::rendezvous::Rendezvous;
use super::{Collective, DistError, Move, Operation};
use crate::config::{self, Compress};
use crate::shim::ShimError;
use crate::shim::c10d::{Group, Member, Reducer, Role, Store, Wire, taking_part};

/// Interval of checking whether rank 0 has finished what it does alone.
const LOOK: Duration = Duration::from_millis(5);
/// The longest such interval, since a thousand ranks may be checking.
const LOOK_MAX: Duration = Duration::from_millis(200);
/// Interval of checking for lost ranks.
const LOOK_ROUND: Duration = Duration::from_secs(1);
/// A rank that has not checked for so long was itself stopped; the silence of others then means nothing.
const STOPPED: Duration = Duration::from_secs(5);
/// How long the rank that serves the store waits for the others to leave.
pub(super) const FAREWELL: Duration = Duration::from_secs(30);
/// The store's counter of the tasks that rank 0 has done alone.
const FIRST: &str = "first";
/// The store's counter of ranks that have left.
pub(super) const LEFT: &str = "left";

/// One of several ranks.
#[derive(Debug)]
pub struct C10d {
    // Dropped in this order: what uses the group before the group, the store last.
    reducer: RefCell<Option<Reducer>>,
    group: Group,
    heartbeat: Heartbeat,
    store: Arc<Store>,
    member: Member,
    role: Role,
    device: Device,
    options: config::Dist,
    stop: Arc<AtomicBool>,
    sent: Cell<u64>,
    /// Number of tasks that rank 0 has done alone.
    turns: Cell<u64>,
}

impl C10d {
    /// Makes the process group after the rendezvous; tensors will be on `device`. `stop` is set when this
    /// process is asked to stop.
    ///
    /// # Errors
    /// When a rank is lost, or the network or the GPU cannot be used.
    pub fn new(
        rendezvous: Rendezvous,
        device: Device,
        options: &config::Dist,
        stop: Arc<AtomicBool>,
    ) -> Result<C10d, DistError> {
        let Rendezvous { spec, store, heartbeat, .. } = rendezvous;
        let (member, timeout) = (spec.member, Duration::from_secs(options.timeout_seconds));
        let slow = Duration::from_secs(options.slow_seconds);
        heartbeat.set_limits(Limits { slow, timeout });
        let made = match device {
            Device::Cuda(gpu) => Group::nccl(&store, gpu, member, timeout),
            _ => address_towards(&spec.master, spec.port)
                .and_then(|host| Group::gloo(&store, &host, member, timeout)),
        };
        // A network that does not carry is found now, not in the first step.
        // NCCL meets here for the first time, and waits without a limit of its own.
        heartbeat.begin();
        let group = made.and_then(|group| group.barrier(timeout).map(|()| group));
        heartbeat.done();
        let group = group.map_err(|source| {
            let (operation, missing) = (Operation::Group, heartbeat.explain(&store));
            let error =
                DistError::Collective { size: member.size, step: 0, operation, missing, source };
            heartbeat.fail(&store, spec.role, &error.to_string());
            error
        })?;
        if device.is_cuda() {
            heartbeat.collectives_are_queued();
        }
        Ok(C10d {
            reducer: RefCell::new(None),
            group,
            heartbeat,
            store,
            member,
            role: spec.role,
            device,
            options: options.clone(),
            stop,
            sent: Cell::new(0),
            turns: Cell::new(0),
        })
    }

    /// Tells the others why this rank ends.
    pub fn fail(&self, message: &str) {
        self.heartbeat.fail(&self.store, self.role, message);
    }

    /// Adds to a number that all ranks share, and returns the sum.
    ///
    /// # Errors
    /// When the store is gone.
    pub fn count(&self, what: &str, more: u64) -> Result<u64, DistError> {
        let sum = self.store.add(what, more as i64);
        sum.map(|sum| sum as u64).map_err(|_| {
            let (awaited, missing) = ("the store".into(), self.heartbeat.explain(&self.store));
            DistError::Awaited { awaited, missing }
        })
    }

    /// Leaves the world. The rank that serves the store leaves last: without it the others could not tell
    /// an end from a loss.
    pub fn leave(self) {
        self.heartbeat.at(self.heartbeat.step(), Move::Leave);
        let size = self.member.size as i64;
        let deadline = Instant::now() + FAREWELL;
        let C10d { reducer, group, heartbeat, store, role, .. } = self;
        drop(reducer);
        heartbeat.begin();
        let _ = group.shut_down(); // the run is over, and its last checkpoint is written
        heartbeat.done();
        drop(group);
        drop(heartbeat); // nobody beats into a store that is about to go
        let mut left = store.add(LEFT, 1);
        while role == Role::Serve && left.is_ok_and(|left| left < size) && Instant::now() < deadline
        {
            thread::sleep(LOOK);
            left = store.add(LEFT, 0);
        }
    }

    /// Runs a collective, with heartbeats; `bytes` is what it sends to others.
    fn run<T>(
        &self,
        operation: Operation,
        bytes: u64,
        body: impl FnOnce(&Group) -> Result<T, ShimError>,
    ) -> Result<T, DistError> {
        self.sent.set(self.sent.get() + bytes);
        self.heartbeat.begin();
        let result = body(&self.group);
        self.heartbeat.done();
        result.map_err(|source| {
            let (step, missing) = (self.heartbeat.step(), self.heartbeat.explain(&self.store));
            DistError::Collective { size: self.member.size, step, operation, missing, source }
        })
    }

    /// Bytes that each rank sends in a ring all-reduce of `bytes`: twice all but its own share.
    fn ring(&self, bytes: u64) -> u64 {
        2 * bytes * (self.member.size as u64 - 1) / self.member.size as u64
    }

    /// The reducer of this run, which averages gradients during the backward pass. The graph of the first loss
    /// shows which parameters take part; the first step is averaged like all others, so that a resumed run has
    /// the same bits.
    fn reducer_for(&self, loss: &Tensor, parameters: &[Tensor]) -> Result<Reducer, DistError> {
        let wire = match self.options.compress {
            Compress::None => Wire::Whole,
            Compress::Bf16 => Wire::Bf16,
        };
        let bucket_bytes = self.options.bucket_mb << 20;
        self.run(Operation::Gradients, 0, |group| {
            Reducer::new(group, &taking_part(loss, parameters)?, bucket_bytes, wire)
        })
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

impl Collective for C10d {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn size(&self) -> usize {
        self.member.size
    }

    fn gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        let mine = mine.detach().contiguous();
        let mut shape = mine.size();
        shape[0] *= self.member.size as i64;
        let mut all = Tensor::empty(&shape, (mine.kind(), mine.device()));
        let bytes = bytes_of(&mine) * (self.member.size as u64 - 1);
        self.run(Operation::Gather, bytes, |group| group.gather(&mine, &mut all)?.wait())?;
        Ok(all)
    }

    fn exchange(&self, mine: &Tensor, send: &[i64], receive: &[i64]) -> Result<Tensor, DistError> {
        let mine = mine.detach().contiguous();
        let mut shape = mine.size();
        let rows = shape[0].max(1);
        shape[0] = receive.iter().sum();
        let mut into = Tensor::empty(&shape, (mine.kind(), mine.device()));
        let away = rows - send[self.member.rank];
        let bytes = bytes_of(&mine) / rows as u64 * away as u64;
        self.run(Operation::Exchange, bytes, |group| {
            group.exchange(&mine, send, &mut into, receive)?.wait()
        })?;
        Ok(into)
    }

    fn average(&self, tensors: &mut [Tensor]) -> Result<(), DistError> {
        if tensors.is_empty() {
            return Ok(());
        }
        // One collective for all of them.
        let flat: Vec<Tensor> = tensors.iter().map(|t| t.detach().reshape([-1])).collect();
        let sizes: Vec<i64> = flat.iter().map(|t| t.size()[0]).collect();
        let mut all = Tensor::cat(&flat, 0);
        self.run(Operation::Average, self.ring(bytes_of(&all)), |group| {
            group.sum(&mut all)?.wait()
        })?;
        let _ = all.g_div_scalar_(self.member.size as f64); // an alias of what it changed
        tch::no_grad(|| {
            for (tensor, mean) in tensors.iter_mut().zip(all.split_with_sizes(&sizes, 0)) {
                tensor.copy_(&mean.reshape(tensor.size()));
            }
        });
        Ok(())
    }

    fn backward(&self, loss: &Tensor, parameters: &[Tensor]) -> Result<(), DistError> {
        let mut reducer = self.reducer.borrow_mut();
        let reducer = match reducer.as_ref() {
            Some(reducer) => reducer,
            None => reducer.insert(self.reducer_for(loss, parameters)?),
        };
        self.run(Operation::Gradients, 0, |_| reducer.backward(loss))?;
        let whole: u64 = parameters.iter().filter(|p| p.grad().defined()).map(bytes_of).sum();
        let bytes = match self.options.compress {
            Compress::None => whole,
            Compress::Bf16 => whole / 2,
        };
        self.sent.set(self.sent.get() + self.ring(bytes));
        Ok(())
    }

    fn broadcast(&self, tensors: &mut [Tensor]) -> Result<(), DistError> {
        for tensor in tensors {
            let mut there = tensor.detach().to_device(self.device).contiguous();
            self.run(Operation::Broadcast, bytes_of(tensor), |group| {
                group.broadcast(&mut there, 0)?.wait()
            })?;
            tch::no_grad(|| tensor.copy_(&there));
        }
        Ok(())
    }

    fn after_first(&self) -> Result<(), DistError> {
        let turn = self.turns.get() + 1;
        self.turns.set(turn);
        let lost = |missing| DistError::Awaited { awaited: "rank 0".into(), missing };
        let (mut others, mut pause, mut looked) = (self.heartbeat.others(), LOOK, Instant::now());
        let result = loop {
            let done = match self.member.rank {
                0 => self.store.add(FIRST, 1).map(|_| true),
                _ => self.store.add(FIRST, 0).map(|turns| turns as u64 >= turn),
            };
            match done {
                Ok(true) => break Ok(()),
                Ok(false) => {}
                Err(_) => break Err(self.heartbeat.explain(&self.store)),
            }
            if looked.elapsed() > LOOK_ROUND {
                if looked.elapsed() > STOPPED {
                    others = self.heartbeat.others();
                }
                looked = Instant::now();
                if let Some(missing) = self.heartbeat.lost(&self.store, &mut others) {
                    break Err(missing);
                }
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LOOK_MAX);
        };
        result.map_err(lost)
    }

    fn at(&self, step: u64, what: Move) {
        self.heartbeat.at(step, what);
    }

    fn is_asked_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn bytes_sent(&self) -> u64 {
        self.sent.get()
    }
}

/// The address of this machine from which `master` is reached: the network that the ranks share.
fn address_towards(master: &str, port: u16) -> Result<String, ShimError> {
    let fault = |error: std::io::Error| {
        ShimError::new(format!("no way from this machine to {master}:{port}: {error}"))
    };
    let mut last = std::io::Error::other("the name has no address");
    for there in (master, port).to_socket_addrs().map_err(fault)? {
        let any = if there.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // Connecting a UDP socket sends nothing: it asks the system for a route.
        let route = UdpSocket::bind(any).and_then(|socket| {
            socket.connect(there)?;
            socket.local_addr()
        });
        match route {
            // An address that holds on one link alone is none without that link.
            Ok(SocketAddr::V6(here)) if here.scope_id() != 0 => {
                return Ok(format!("{}%{}", here.ip(), here.scope_id()));
            }
            Ok(here) => return Ok(here.ip().to_string()),
            Err(error) => last = error,
        }
    }
    Err(fault(last))
}
