//! Times the exchange alone: every rank passes a partial that it has, and gets the merged one.

use serde::Serialize;
use treeattn::attention::{AttentionDesc, Dtype, Tensor};
use treeattn::device::HostBuffer;
use treeattn::runtime::{CommConfig, Communicator, Device, MergeArgs, Plan, Runtime, RuntimeConfig};

use super::pool::Random;
use super::ranks;
use super::samples::{Samples, Summary};
use crate::outcome::Outcome;

/// Heads of the partials.
const HEADS: usize = 32;
/// Elements of a head.
const DIM: usize = 128;
/// Turns before those that count.
const WARM_UP: usize = 200;

/// What an exchange took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Exchange {
    pub ranks: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub seconds: Summary,
}

/// Exchanges of 32 x 128 f32 partials between `ranks` ranks of one thread, `turns` times, the ranks released together.
pub fn time(ranks: usize, turns: usize) -> Outcome<Exchange> {
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let config = CommConfig { threads_per_rank: 1, ..CommConfig::default() };
    let comms = Communicator::create_local(&runtime, &vec![Device::CPU; ranks], &config)?;
    let mut desc = AttentionDesc::new(HEADS as i32, 0, DIM as i32, 1);
    desc.out_dtype = Dtype::F32;
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc)?;
    let partials = (0..ranks).map(|rank| Partial::new(1 + rank as u64)).collect::<Outcome<Vec<_>>>()?;
    let step = |rank: usize, _: usize| {
        let args = partials[rank].args();
        // SAFETY: the partials outlive the merge, which blocks, and each rank has its own.
        unsafe { plans[rank].merge(&args, None) }
    };
    let samples = Samples::from(ranks::time(ranks, turns + WARM_UP, &step)?.split_off(WARM_UP));
    Ok(Exchange { ranks, heads: HEADS, head_dim: DIM, seconds: samples.summary() })
}

/// One rank's partial and where the merged one goes.
struct Partial {
    o: Vec<f32>,
    lse: Vec<f32>,
    out: HostBuffer,
    out_lse: HostBuffer,
}

impl Partial {
    fn new(seed: u64) -> Outcome<Partial> {
        let mut random = Random(seed);
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| random.float()).collect() };
        Ok(Partial {
            o: floats(HEADS * DIM),
            lse: floats(HEADS),
            out: HostBuffer::new(HEADS * DIM * 4)?,
            out_lse: HostBuffer::new(HEADS * 4)?,
        })
    }

    fn args(&self) -> MergeArgs {
        let output = |buffer: &HostBuffer| Tensor {
            data: buffer.as_mut_ptr().cast(),
            bytes: buffer.len() as u64,
            stride: [0; 4],
        };
        MergeArgs {
            query_tokens: 1,
            heads: 0,
            head_dim: 0,
            o: Tensor::from_slice(&self.o),
            o_dtype: Dtype::F32,
            lse: Tensor::from_slice(&self.lse),
            lse_base: 0,
            out: output(&self.out),
            out_dtype: None,
            out_lse: output(&self.out_lse),
            ..MergeArgs::default()
        }
    }
}
