//! What a rank does in a trial: steps until something happens, and what it found then.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use treeattn::attention::{AttentionDesc, DecodeArgs, Tensor};
use treeattn::runtime::{Communicator, Device, DeviceKind, Plan};
use treeattn::{ErrorKind, Result};

use crate::mesh::{self, Mesh};
use crate::trial::{Algorithm, Fault, Place, Trial};

pub const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const KEYS: usize = 9;
/// Most sequences of a step.
const BATCH: usize = 3;

/// How a rank reaches the others.
pub struct Way<'a> {
    /// At the beginning.
    pub connect: &'a dyn Fn() -> Result<Communicator>,
    /// After the trial, as this rank of those that are left.
    pub reconnect: &'a dyn Fn(usize) -> Result<Communicator>,
    /// The sockets of `connect`, if it has any.
    pub mesh: Option<&'a Mesh>,
}

/// What became of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Steps with the right output.
    pub done: usize,
    /// What was not as it should be, in words.
    pub wrong: Option<String>,
    /// The error that ended its steps, the rank that it blames, and how long the call took.
    pub error: Option<(ErrorKind, Option<i32>, Duration)>,
    /// Whether a fresh communicator worked afterwards.
    pub fresh: bool,
}

pub fn shape(algorithm: Algorithm) -> AttentionDesc {
    AttentionDesc {
        max_batch: BATCH as i32,
        max_query_tokens: BATCH as i32,
        algorithm,
        ..AttentionDesc::new(HEADS as i32, KV_HEADS as i32, DIM as i32, KEYS as i32)
    }
}

/// Keys and values of a rank, pseudo-random.
fn cache(rank: usize) -> (Vec<f32>, Vec<f32>) {
    let mut state = 77 * rank as u32 + 1;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let n = BATCH * KEYS * KV_HEADS * DIM;
    ((0..n).map(|_| draw()).collect(), (0..n).map(|_| draw()).collect())
}

fn query(i: usize) -> f32 {
    (i % 7) as f32 / 7.0
}

/// A step of `batch` sequences: out [sequence, head, dim] and lse [sequence, head]. Where it fails, what it left there.
pub fn decode(plan: &Plan, rank: usize, batch: usize) -> std::result::Result<Vec<f32>, (treeattn::Error, Vec<f32>)> {
    let (k, v) = cache(rank);
    let q: Vec<f32> = (0..batch * HEADS * DIM).map(query).collect();
    let length = vec![KEYS as i32; batch];
    let (mut out, mut lse) = (vec![7.0f32; batch * HEADS * DIM], vec![7.0; batch * HEADS]);
    let args = DecodeArgs {
        batch: batch as i32,
        query_tokens: batch as i32,
        q: Tensor::from_slice(&q),
        k: Tensor::from_slice(&k),
        v: Tensor::from_slice(&v),
        out: Tensor::from_slice_mut(&mut out),
        lse: Tensor::from_slice_mut(&mut lse),
        kv_length: length.as_ptr(),
        ..DecodeArgs::default()
    };
    // SAFETY: every buffer outlives the step, which runs here.
    let result = unsafe { plan.decode(&args, None) };
    out.extend(lse);
    result.map(|()| out.clone()).map_err(|error| (error, out))
}

/// The same over all ranks in float64.
fn exact(world: usize, batch: usize) -> Vec<f64> {
    let caches: Vec<_> = (0..world).map(cache).collect();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (b, h) in (0..batch).flat_map(|b| (0..HEADS).map(move |h| (b, h))) {
        let row = |cache: &[f32], key: usize, d: usize| {
            f64::from(cache[((b * KEYS + key) * KV_HEADS + h / (HEADS / KV_HEADS)) * DIM + d])
        };
        let (mut sum, mut o) = (0.0, [0.0; DIM]);
        for (k, v) in &caches {
            for key in 0..KEYS {
                let dot: f64 = (0..DIM).map(|d| f64::from(query((b * HEADS + h) * DIM + d)) * row(k, key, d)).sum();
                let weight = (dot / (DIM as f64).sqrt()).exp();
                sum += weight;
                o.iter_mut().enumerate().for_each(|(d, o)| *o += weight * row(v, key, d));
            }
        }
        out.extend(o.iter().map(|o| o / sum));
        lse.push(sum.ln());
    }
    out.extend(lse);
    out
}

fn close(found: f32, wanted: f64) -> bool {
    (f64::from(found) - wanted).abs() <= 3e-6 * wanted.abs().max(1.0)
}

/// Whether outputs are those of `world` ranks.
pub fn right(found: &[f32], world: usize, batch: usize) -> bool {
    let wanted = exact(world, batch);
    found.len() == wanted.len() && found.iter().zip(&wanted).all(|(&found, &wanted)| close(found, wanted))
}

/// The whole life of a rank.
pub fn run(trial: &Trial, rank: usize, way: &Way) -> Outcome {
    let mut outcome = Outcome::default();
    let comm = match (way.connect)() {
        Ok(comm) => comm,
        Err(error) => return Outcome { wrong: Some(format!("no communicator: {error}")), ..outcome },
    };
    if let Some(mesh) = way.mesh {
        mesh.deaf.store(i32::from(trial.deaf && rank != trial.victim), Ordering::Relaxed);
    }
    steps(trial, rank, way, &comm, &mut outcome);
    if let Some(new_rank) = trial.survivors().iter().position(|&left| left == rank) {
        drop(comm);
        outcome.fresh = match fresh(trial, new_rank, way) {
            Ok(fresh) => fresh,
            Err(error) => {
                outcome.wrong.get_or_insert(format!("a fresh communicator: {error}"));
                false
            }
        };
    }
    outcome
}

fn steps(trial: &Trial, rank: usize, way: &Way, comm: &Communicator, outcome: &mut Outcome) {
    let victim = rank == trial.victim;
    let mut desc = shape(trial.algorithm);
    if victim && trial.fault == Fault::Descriptor {
        desc.max_query_tokens += 1;
    }
    let began = Instant::now();
    let plan = match Plan::create(comm, &desc) {
        Ok(plan) => plan,
        Err(error) => {
            outcome.error = Some((error.kind(), error.rank(), began.elapsed()));
            return;
        }
    };
    let mut helper = None;
    for step in 0..trial.steps() {
        let mut batch = 1 + step % 2;
        if victim && step == trial.at {
            match trial.fault {
                Fault::None | Fault::Descriptor => {}
                Fault::Silent => return thread::sleep(trial.deadline() * 4),
                Fault::Killed => helper = Some(die_soon(trial, way, comm)),
                Fault::Slow => thread::sleep(trial.slowness()),
                Fault::Late => thread::sleep(trial.deadline() * 4),
                Fault::Batch => batch = BATCH,
                Fault::Aborted => helper = Some(abort_soon(trial, comm)),
                Fault::Failing => way.mesh.iter().for_each(|mesh| mesh.fault.store(mesh::FAIL, Ordering::Relaxed)),
                Fault::Cut => way.mesh.iter().for_each(|mesh| mesh.fault.store(mesh::CUT, Ordering::Relaxed)),
                Fault::Garbage => way.mesh.iter().for_each(|mesh| mesh.fault.store(mesh::GARBAGE, Ordering::Relaxed)),
                Fault::Unplugged => unplug(),
            }
        }
        let began = Instant::now();
        match decode(&plan, rank, batch) {
            Ok(found) if right(&found, trial.world, batch) => outcome.done += 1,
            Ok(_) => {
                outcome.wrong = Some(format!("step {step}: the wrong output"));
                break;
            }
            Err((error, left)) => {
                outcome.error = Some((error.kind(), error.rank(), began.elapsed()));
                // NaN, nothing, or what is right.
                let wanted = exact(trial.world, batch);
                let harmless = |(&x, &wanted): (&f32, &f64)| x.is_nan() || x == 7.0 || close(x, wanted);
                if !left.iter().zip(&wanted).all(harmless) {
                    outcome.wrong = Some(format!("step {step}: a wrong output beside {error}"));
                }
                outcome.wrong = outcome.wrong.take().or_else(|| stays_broken(comm, &plan, rank, error.kind()));
                break;
            }
        }
    }
    helper.into_iter().for_each(|helper: thread::JoinHandle<()>| helper.join().unwrap());
}

/// A broken communicator says so, and its plan leaves NaN in every output.
fn stays_broken(comm: &Communicator, plan: &Plan, rank: usize, kind: ErrorKind) -> Option<String> {
    let Ok(status) = comm.status() else { return None };
    if status.error.as_ref().map(treeattn::Error::kind) != Some(kind) {
        return Some(format!("status {:?} after {kind:?}", status.error));
    }
    match decode(plan, rank, 1) {
        Err((error, left)) if error.kind() == kind && left.iter().all(|x| x.is_nan()) => None,
        other => Some(format!("another step after {kind:?}: {other:?}")),
    }
}

/// Ends this rank at a moment of its own: the process, its sockets, or its place in the group.
fn die_soon(trial: &Trial, way: &Way, comm: &Communicator) -> thread::JoinHandle<()> {
    let pause = trial.pause();
    if trial.place == Place::Local {
        comm.close();
        return thread::spawn(|| {});
    }
    if trial.in_processes() {
        return thread::spawn(move || {
            thread::sleep(pause);
            // SAFETY: no memory is passed; this process is meant to end here.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        });
    }
    thread::sleep(pause);
    way.mesh.iter().for_each(|mesh| mesh.cut());
    thread::spawn(|| {})
}

fn abort_soon(trial: &Trial, comm: &Communicator) -> thread::JoinHandle<()> {
    let (pause, comm) = (trial.pause(), comm.clone());
    thread::spawn(move || {
        thread::sleep(pause);
        comm.abort().unwrap();
    })
}

/// Takes the network link of this namespace down.
fn unplug() {
    let done = std::process::Command::new("ip").args(["link", "set", "eth0", "down"]).status().unwrap();
    assert!(done.success());
}

/// The ranks that are left, as a group of their own in the same processes.
fn fresh(trial: &Trial, rank: usize, way: &Way) -> Result<bool> {
    let comm = (way.reconnect)(rank)?;
    let plan = Plan::create(&comm, &shape(Algorithm::Auto))?;
    let found = decode(&plan, rank, 2).map_err(|(error, _)| error)?;
    Ok(right(&found, trial.survivors().len(), 2))
}
