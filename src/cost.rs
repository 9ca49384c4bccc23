//! What a decode step takes, predicted: bytes over bandwidth, launches and hops, for each way in which ranks on GPUs exchange.
//!
//! The constants of [`Machine::H200`] come from measurements of parts, never of the steps that are predicted: the read kernel, the
//! shortest step, exchanges and collectives alone. What lies between nodes was not measured here: those constants are published ones
//! (NCCL's own model and its users' runs on H100). `treeattn simulate` shows them all beside what follows from them.

use crate::attention::Algorithm;

/// A way from rank to rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Microseconds for the least that can be sent.
    pub latency_us: f64,
    /// Payload bytes a second.
    pub bandwidth: f64,
}

impl Link {
    /// Microseconds for `bytes`.
    pub fn time(&self, bytes: f64) -> f64 {
        self.latency_us + bytes / self.bandwidth * 1e6
    }
}

/// GPUs of one kind, nodes of them, and what lies between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    pub name: &'static str,
    pub gpus_a_node: usize,
    /// Read bandwidth of a GPU's memory, bytes a second.
    pub read_bandwidth: f64,
    /// Of a step of one GPU whatever its keys: launch, queries, the last merge; microseconds.
    pub step_us: f64,
    /// A partial pushed to each peer's window, and merged there.
    pub windows: Link,
    /// One allgather of NCCL in a node; its bandwidth is that of what a rank receives.
    pub allgather: Link,
    /// One allreduce of NCCL in a node; its bandwidth is that of its input.
    pub allreduce: Link,
    /// Keys and values copied to the next GPU of a node, by NCCL.
    pub copy: Link,
    /// One allgather of NCCL among nodes, a rank each; what each further node adds.
    pub between: Link,
    pub further_node_us: f64,
    /// One allreduce of NCCL over two nodes; what each doubling of nodes adds.
    pub allreduce_between: Link,
    pub doubling_us: f64,
}

impl Machine {
    /// H200s, eight a node, joined by NVLink; nodes by a link of 400 Gb/s a GPU.
    pub const H200: Machine = Machine {
        name: "H200, NVLink, 400 Gb/s a GPU between nodes",
        gpus_a_node: 8,
        read_bandwidth: 4.55e12,
        // 1,024 keys take 6.9 us, 0.9 of them for their bytes.
        step_us: 6.0,
        // Alone, a replayed graph: 2.75 us at 16.6 KB, 8.78 at 1.02 MB.
        windows: Link { latency_us: 2.65, bandwidth: 167e9 },
        // 9.8 us at 16.6 KB, 15.5 at 532 KB.
        allgather: Link { latency_us: 9.6, bandwidth: 90e9 },
        // 10.4 us at 16.6 KB, 16.6 at 532 KB.
        allreduce: Link { latency_us: 10.2, bandwidth: 83e9 },
        copy: Link { latency_us: 9.8, bandwidth: 396e9 },
        // Published: 12 to 20 us, and 2.7 a hop of the ring.
        between: Link { latency_us: 15.0, bandwidth: 50e9 },
        further_node_us: 2.7,
        // Published: 35 us at 2 x 8 H100, and twice 5 a level of the tree.
        allreduce_between: Link { latency_us: 35.0, bandwidth: 20e9 },
        doubling_us: 10.0,
    };

    /// What two shots of windows among `ranks` take, and one, for a partial of `bytes` a rank, microseconds.
    pub fn shots(&self, ranks: usize, bytes: f64) -> (f64, f64) {
        let peers = ranks as f64 - 1.0;
        let one = self.windows.time(peers * bytes);
        let two = 2.0 * self.windows.time(peers * bytes / ranks as f64);
        (two, one)
    }
}

/// What is decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Bytes of an element of keys and values.
    pub element_bytes: f64,
}

impl Shape {
    /// Bytes of the keys and values of all sequences, `keys` each.
    pub fn cache_bytes(&self, keys: usize) -> f64 {
        2.0 * (self.batch * self.kv_heads * self.head_dim * keys) as f64 * self.element_bytes
    }

    /// Bytes of a partial: o in f32, and a log-sum-exp in two.
    pub fn partial_bytes(&self) -> f64 {
        (self.batch * self.q_heads * (4 * self.head_dim + 8)) as f64
    }
}

/// A step, predicted, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Each GPU's own shard.
    pub local_us: f64,
    /// All that comes after it; of a ring what comes after the own block.
    pub exchange_us: f64,
}

impl Cost {
    /// All of it.
    pub fn total_us(&self) -> f64 {
        self.local_us + self.exchange_us
    }
}

/// A step over `gpus` GPUs, whose sequences have `keys` keys each. None where the algorithm is none for them: TREE in one node,
/// windows between nodes. `AUTO` as the cheapest.
pub fn step(machine: &Machine, shape: &Shape, keys: usize, gpus: usize, algorithm: Algorithm) -> Option<Cost> {
    let gpus = gpus.max(1);
    let shard = shape.cache_bytes(keys) / gpus as f64;
    let local_us = machine.step_us + shard / machine.read_bandwidth * 1e6;
    if gpus == 1 {
        return Some(Cost { local_us, exchange_us: 0.0 });
    }
    let (nodes, inside) = (gpus.div_ceil(machine.gpus_a_node), gpus.min(machine.gpus_a_node));
    let (bytes, others) = (shape.partial_bytes(), nodes as f64 - 1.0);
    let exchange_us = match algorithm {
        Algorithm::Auto => return cheapest(machine, shape, keys, gpus).map(|(_, cost)| cost),
        Algorithm::OneShot if nodes == 1 => machine.shots(inside, bytes).1,
        Algorithm::TwoShot if nodes == 1 => machine.shots(inside, bytes).0,
        Algorithm::TwoShot => return None,
        // One allgather of all.
        Algorithm::OneShot => {
            machine.between.time((gpus - 1) as f64 * bytes) + (others - 1.0) * machine.further_node_us
        }
        Algorithm::Tree if nodes == 1 => return None,
        Algorithm::Tree => {
            let between = machine.between.time(others * bytes) + (others - 1.0) * machine.further_node_us;
            machine.windows.time((inside as f64 - 1.0) * bytes) + between
        }
        Algorithm::Allreduce3 => {
            let lse = (shape.batch * shape.q_heads * 4) as f64;
            let doublings = (nodes as f64).log2().ceil();
            [lse, bytes, lse]
                .map(|bytes| match nodes {
                    1 => machine.allreduce.time(bytes),
                    _ => machine.allreduce_between.time(bytes) + (doublings - 1.0) * machine.doubling_us,
                })
                .iter()
                .sum()
        }
        Algorithm::Ring => {
            // Every pass waits for the slowest link.
            let link = if nodes == 1 {
                machine.copy
            } else {
                Link { latency_us: machine.between.latency_us, ..machine.between }
            };
            (gpus - 1) as f64 * link.time(shard).max(local_us)
        }
    };
    Some(Cost { local_us, exchange_us })
}

/// The algorithm that takes the least, and what it takes; baselines left out.
pub fn cheapest(machine: &Machine, shape: &Shape, keys: usize, gpus: usize) -> Option<(Algorithm, Cost)> {
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree]
        .into_iter()
        .filter_map(|algorithm| Some((algorithm, step(machine, shape, keys, gpus, algorithm)?)))
        .min_by(|a, b| a.1.total_us().total_cmp(&b.1.total_us()))
}

/// Of `counts` of GPUs the one whose step takes the least, with its algorithm: the smallest that is within `slack` of the best, so
/// that no GPUs are spent on nothing.
pub fn recommend(
    machine: &Machine,
    shape: &Shape,
    keys: usize,
    counts: &[usize],
    slack: f64,
) -> Option<(usize, Algorithm, Cost)> {
    let all: Vec<_> = counts
        .iter()
        .filter_map(|&gpus| cheapest(machine, shape, keys, gpus).map(|(algorithm, cost)| (gpus, algorithm, cost)))
        .collect();
    let best = all.iter().map(|(_, _, cost)| cost.total_us()).min_by(f64::total_cmp)?;
    all.into_iter().filter(|(_, _, cost)| cost.total_us() <= best * (1.0 + slack)).min_by_key(|&(gpus, ..)| gpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Shape = Shape { batch: 1, q_heads: 32, kv_heads: 8, head_dim: 128, element_bytes: 2.0 };

    /// Steps that were measured (kernels/README.md, "Two GPUs") and set no constant: keys of both, batch, then us of the local
    /// kernel, of ours, and of three allreduces.
    const MEASURED: [(usize, usize, f64, f64, f64); 7] = [
        (8_192, 1, 10.13, 12.55, 37.9),
        (16_384, 1, 13.11, 16.61, 43.1),
        (32_768, 1, 20.23, 23.19, 49.3),
        (65_536, 1, 35.28, 37.95, 64.6),
        (262_144, 1, 125.8, 128.3, 155.6),
        (1_048_576, 1, 488.7, 488.1, 515.9),
        (32_768, 32, 487.8, 501.1, 539.1),
    ];

    #[test]
    fn steps_that_set_no_constant_are_predicted_within_a_tenth() {
        for (keys, batch, local, ours, allreduces) in MEASURED {
            let shape = Shape { batch, ..LLAMA };
            let predict = |algorithm| step(&Machine::H200, &shape, keys, 2, algorithm).unwrap();
            let found = [
                (predict(Algorithm::OneShot).local_us, local),
                (predict(Algorithm::Auto).total_us(), ours),
                (predict(Algorithm::Allreduce3).total_us(), allreduces),
            ];
            for (predicted, measured) in found {
                let ratio = predicted / measured;
                assert!((1.0 / 1.1..1.1).contains(&ratio), "{keys} x {batch}: {predicted:.1}, measured {measured}");
            }
        }
    }

    #[test]
    fn what_is_no_way_has_no_cost_and_more_keys_take_longer() {
        let at = |keys, gpus, algorithm| step(&Machine::H200, &LLAMA, keys, gpus, algorithm);
        assert!(at(1000, 8, Algorithm::Tree).is_none() && at(1000, 9, Algorithm::TwoShot).is_none());
        for algorithm in Algorithm::ALL {
            for gpus in [1, 2, 8, 16, 512] {
                if let (Some(few), Some(many)) = (at(80_000, gpus, algorithm), at(5_120_000, gpus, algorithm)) {
                    assert!(few.total_us() > 0.0 && few.total_us() <= many.total_us(), "{algorithm:?} {gpus}");
                }
            }
        }
        let (one, auto) = (at(80_000, 1, Algorithm::Auto).unwrap(), at(80_000, 1, Algorithm::Ring).unwrap());
        assert_eq!((one.exchange_us, auto), (0.0, one));
    }

    #[test]
    fn long_caches_want_many_gpus_and_short_ones_one() {
        let counts: Vec<usize> = (0..10).map(|n| 1 << n).collect();
        let gpus = |keys| recommend(&Machine::H200, &LLAMA, keys, &counts, 0.05).unwrap().0;
        assert_eq!(gpus(1_000), 1);
        assert!(gpus(80_000) <= 8 && gpus(5_120_000) >= 32, "{} {}", gpus(80_000), gpus(5_120_000));
        // The paper's headline.
        let at = |algorithm| step(&Machine::H200, &LLAMA, 5_120_000, 128, algorithm).unwrap().total_us();
        assert!(at(Algorithm::Ring) >= 8.0 * at(Algorithm::Auto));
    }

    #[test]
    fn two_shots_pay_for_large_partials_of_many_ranks_only() {
        let cheaper = |ranks, bytes| {
            let (two, one) = Machine::H200.shots(ranks, bytes);
            two < one
        };
        assert!(!cheaper(2, 1e9) && !cheaper(8, 16_640.0) && cheaper(8, 133_120.0));
    }
}
