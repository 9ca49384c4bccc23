//! The energy F(zeta) and its gradient: against float64 over everything that is accepted, and what the paper says of them.

use std::collections::HashMap;

use treeattn::attention::reference::{self, Comparison, Precision, Reference};
use treeattn::attention::{
    AttentionDesc, DecodeArgs, Dtype, KvLayout, MaskKind, OutputMode, Placement, Shard, Step, Tensor,
};
use treeattn::runtime::{Device, MergeArgs, Runtime, RuntimeConfig, Stream, energy, merge_partials};
use treeattn::{ErrorKind, Result};

use crate::support::case::Case;
use crate::support::rank::Rank;
use crate::support::rng::Rng;
use crate::support::values::Values;
use crate::support::{full, random, seed};

const ALONE: Shard = Shard { rank: 0, world: 1 };
const F32: Precision = Precision { out: Dtype::F32, wire: Dtype::F32 };

/// Zeta of every query token and head that moves scores by about `size`.
fn zetas(case: &Case, r: &mut Rng, size: f64) -> Vec<f32> {
    let largest = case.sequences.iter().flat_map(|s| &s.v).filter(|v| v.is_finite()).fold(0f32, |m, v| m.max(v.abs()));
    let dim = case.desc.head_dim_v as usize;
    let unit = size / (f64::from(largest.max(1e-30)) * (dim as f64).sqrt());
    (0..case.tokens * case.desc.q_heads as usize * dim).map(|_| (unit * r.normal()) as f32).collect()
}

/// Float64 over one rank's keys.
fn wanted(case: &Case, rank: &Rank, zeta: &Tensor) -> Reference {
    let desc = &case.desc;
    let step = Step::new(desc, ALONE, &rank.args, desc.q_heads).and_then(|step| step.at_zeta(desc, zeta)).unwrap();
    // SAFETY: the rank's memory is what its arguments say.
    unsafe { reference::attend(desc, ALONE, &step) }.unwrap()
}

/// Evaluates on every rank's own keys, holds each against float64, and the merged whole where the type allows it.
fn check(case: &Case, runtime: &Runtime, stream: Option<&Stream>, found: &mut Comparison) {
    let (desc, mut r) = (&case.desc, Rng::new(case.seed ^ 0xe4e5));
    let size = r.pick(&[0.0, 1.0, 1.0, 10.0]);
    let zeta = zetas(case, &mut r, size);
    let zeta = if r.chance(10) { Tensor::NULL } else { Tensor::from_slice(&zeta) };
    let mut shards = Vec::new();
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for rank in 0..case.world {
        let mut rank = Rank::new(case, rank);
        rank.prefill(0x5a);
        // SAFETY: the rank's memory outlives the evaluation, which is waited for.
        let result = unsafe { energy(runtime, Device::CPU, desc, &rank.args, &zeta, stream) };
        result.and_then(|()| stream.map_or(Ok(()), Stream::synchronize)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(rank.strays(case, 0x5a), 0, "{}", case.describe());
        let reference = wanted(case, &rank, &zeta);
        let precision = Precision { out: desc.out_dtype, wire: Dtype::F32 };
        for token in 0..case.tokens {
            for head in 0..desc.q_heads as usize {
                let (row, f) = (token * desc.q_heads as usize + head, rank.lse_of(case, token, head));
                let gradient = rank.row(case, token, head).0;
                reference.compare_row(row, &gradient, f, precision, found);
                o.extend(gradient);
                lse.extend(f);
            }
        }
        shards.push(reference);
    }
    if desc.out_dtype == Dtype::F32 && case.want_lse && case.tokens > 0 {
        let merged = reference::merge(&shards).unwrap();
        let (out, f) = merge(runtime, case, &o, &lse);
        let dim = merged.dim;
        for row in 0..merged.rows() {
            merged.compare_row(row, &out[row * dim..][..dim], Some(f[row]), F32, found);
        }
    }
}

/// Merges the partials of all ranks in one place.
fn merge(runtime: &Runtime, case: &Case, o: &[f32], lse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut out_lse) = (vec![0.0; o.len() / case.world], vec![0.0; lse.len() / case.world]);
    let args = MergeArgs {
        query_tokens: case.tokens as i32,
        heads: case.desc.q_heads,
        head_dim: case.desc.head_dim_v,
        o: Tensor::from_slice(o),
        o_dtype: Dtype::F32,
        lse: Tensor::from_slice(lse),
        lse_base: 0,
        out: Tensor::from_slice_mut(&mut out),
        out_dtype: None,
        out_lse: Tensor::from_slice_mut(&mut out_lse),
        ..MergeArgs::default()
    };
    // SAFETY: the arrays outlive the call.
    unsafe { merge_partials(runtime, Device::CPU, &args, case.world, None) }.unwrap();
    (out, out_lse)
}

#[test]
fn random_cases_and_their_merges_are_within_the_bounds() {
    let count = if full() { 3000 } else { 150 };
    let mut runtimes: HashMap<String, (Runtime, Stream)> = HashMap::new();
    let mut found = Comparison::default();
    for index in 0..count {
        let layout = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages][index as usize % 3];
        let mut case = random::case(Rng::derive(seed() ^ 0xe, index), layout);
        case.desc.output = OutputMode::Replicated;
        if matches!(case.desc.placement, Placement::Interleaved { .. }) && case.world > 1 {
            // Whose shard it is, is not said.
            (case.desc.causal, case.desc.window, case.desc.alibi) = (false, 0, false);
            case.terms.slopes.clear();
        }
        let (runtime, stream) = runtimes.entry(case.isa.clone()).or_insert_with_key(|isa| {
            let runtime = Runtime::new(RuntimeConfig { cpu_isa: Some(isa.clone()) }).unwrap();
            let stream = Stream::new(&runtime, Device::CPU).unwrap();
            (runtime, stream)
        });
        let before = found.broken;
        check(&case, runtime, case.streams.then_some(stream), &mut found);
        if found.broken > before {
            println!("{}", case.describe());
        }
    }
    println!("{count} cases, {} elements, {:.3} and {:.3} of the bounds", found.elements, found.worst, found.worst_lse);
    assert!(found.is_within(), "{found:?}");
}

/// One query head over `keys` keys, at any zeta.
struct Problem {
    runtime: Runtime,
    desc: AttentionDesc,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const DIM: usize = 6;

impl Problem {
    fn new(seed: u64, keys: usize) -> Problem {
        let mut r = Rng::new(seed);
        let mut draw = |n: usize| (0..n).map(|_| r.normal() as f32).collect::<Vec<f32>>();
        Problem {
            runtime: Runtime::new(RuntimeConfig::default()).unwrap(),
            desc: AttentionDesc { scale: 0.7, ..AttentionDesc::new(1, 1, DIM as i32, keys as i32) },
            q: draw(DIM),
            k: draw(keys * DIM),
            v: draw(keys * DIM),
        }
    }

    fn with<T>(&self, out: &mut [f32], lse: &mut f32, use_args: impl FnOnce(&DecodeArgs) -> T) -> T {
        let keys = self.desc.max_kv_length;
        use_args(&DecodeArgs {
            batch: 1,
            query_tokens: 1,
            q: Tensor::from_slice(&self.q),
            k: Tensor::from_slice(&self.k),
            v: Tensor::from_slice(&self.v),
            out: Tensor::from_slice_mut(out),
            lse: Tensor::from_slice_mut(std::slice::from_mut(lse)),
            kv_length: &keys,
            ..DecodeArgs::default()
        })
    }

    /// What the library says: F and its gradient.
    fn energy(&self, zeta: Option<&[f32]>) -> (f32, Vec<f32>) {
        let (mut out, mut f) = (vec![0.0; DIM], 0.0);
        let zeta = zeta.map_or(Tensor::NULL, Tensor::from_slice);
        self.with(&mut out, &mut f, |args| {
            // SAFETY: everything outlives the call.
            unsafe { energy(&self.runtime, Device::CPU, &self.desc, args, &zeta, None) }.unwrap();
        });
        (f, out)
    }

    /// The same in float64.
    fn exact(&self, zeta: &[f64]) -> (f64, Vec<f64>) {
        let score = |j: usize| -> f64 {
            (0..DIM)
                .map(|d| {
                    let at = j * DIM + d;
                    f64::from(self.desc.scale) * f64::from(self.q[d]) * f64::from(self.k[at])
                        + zeta[d] * f64::from(self.v[at])
                })
                .sum()
        };
        let scores: Vec<f64> = (0..self.k.len() / DIM).map(score).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut gradient = vec![0.0; DIM];
        for (j, s) in scores.iter().enumerate() {
            for (d, g) in gradient.iter_mut().enumerate() {
                *g += (s - max).exp() / sum * f64::from(self.v[j * DIM + d]);
            }
        }
        (max + sum.ln(), gradient)
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn near(a: &[f32], b: &[f64], tolerance: f64) -> bool {
    a.iter().zip(b).all(|(&a, &b)| (f64::from(a) - b).abs() <= tolerance)
}

#[test]
fn the_gradient_is_the_central_difference_and_at_zero_the_attention_output() {
    for seed in 0..20 {
        let problem = Problem::new(seed, 3 + 11 * seed as usize);
        let mut r = Rng::new(seed ^ 77);
        let size = r.pick(&[0.0, 0.5, 2.0]);
        // Multiples of 2^-10: exact in float32 with and without the step.
        let zeta: Vec<f64> = (0..DIM).map(|_| (1024.0 * size * r.normal()).round() / 1024.0).collect();
        let (f, gradient) = problem.energy(Some(&narrow(&zeta)));
        let (exact_f, exact_gradient) = problem.exact(&zeta);
        assert!((f64::from(f) - exact_f).abs() <= 2e-6 * exact_f.abs().max(1.0));
        assert!(near(&gradient, &exact_gradient, 1e-5), "{gradient:?} {exact_gradient:?}");
        for d in 0..DIM {
            let at = |h: f64| {
                let mut zeta = zeta.clone();
                zeta[d] += h;
                zeta
            };
            // In float64 to ten digits, and in the library's float32 to what rounding of F leaves.
            let h = 1e-5;
            let difference = (problem.exact(&at(h)).0 - problem.exact(&at(-h)).0) / (2.0 * h);
            assert!((f64::from(gradient[d]) - difference).abs() <= 1e-5, "{gradient:?} {difference}");
            let h = 1.0 / 64.0;
            let (above, below) = (problem.energy(Some(&narrow(&at(h)))).0, problem.energy(Some(&narrow(&at(-h)))).0);
            let difference = f64::from(above - below) / (2.0 * h);
            assert!((f64::from(gradient[d]) - difference).abs() <= 2e-3, "{gradient:?} {difference}");
        }
        // At 0: attention, whether zeta is left out or zero.
        let (lse, attention) = problem.energy(None);
        let (zero_f, zero_gradient) = problem.energy(Some(&[0.0; DIM]));
        let (exact_lse, exact_attention) = problem.exact(&[0.0; DIM]);
        assert!(near(&attention, &exact_attention, 2e-6) && (f64::from(lse) - exact_lse).abs() <= 2e-6);
        assert!(near(&zero_gradient, &exact_attention, 2e-6) && (f64::from(zero_f) - exact_lse).abs() <= 2e-6);
        assert_eq!((lse, attention), decode(&problem), "the bits of a step");
    }
}

/// The same problem as a decode step of a plan.
fn decode(problem: &Problem) -> (f32, Vec<f32>) {
    use treeattn::runtime::{CommConfig, Communicator, Plan};
    let config = CommConfig { threads_per_rank: 1, ..CommConfig::default() };
    let comms = Communicator::create_local(&problem.runtime, &[Device::CPU], &config).unwrap();
    let plan = Plan::create(&comms[0], &problem.desc).unwrap();
    let (mut out, mut lse) = (vec![0.0; DIM], 0.0);
    problem.with(&mut out, &mut lse, |args| {
        // SAFETY: everything outlives the call.
        unsafe { plan.decode(args, None) }.unwrap();
    });
    (lse, out)
}

#[test]
fn the_energy_is_convex_along_random_lines() {
    for seed in 0..50 {
        let problem = Problem::new(1000 + seed, 40);
        let mut r = Rng::new(seed);
        let direction: Vec<f64> = (0..DIM).map(|_| r.normal()).collect();
        let start: Vec<f64> = (0..DIM).map(|_| r.normal()).collect();
        let at = |t: f64| -> Vec<f32> { start.iter().zip(&direction).map(|(s, d)| (s + t * d) as f32).collect() };
        let points: Vec<f64> = (-20..=20).map(|i| f64::from(i) / 5.0).collect();
        let values: Vec<(f32, Vec<f32>)> = points.iter().map(|&t| problem.energy(Some(&at(t)))).collect();
        let slope = |i: usize| -> f64 { values[i].1.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum() };
        for i in 1..points.len() - 1 {
            let (before, here, after) = (values[i - 1].0, values[i].0, values[i + 1].0);
            assert!(here <= 0.5 * (before + after) + 4e-6 * here.abs().max(1.0), "{before} {here} {after}");
            assert!(slope(i + 1) >= slope(i) - 2e-5, "the slope falls: {} {}", slope(i), slope(i + 1));
        }
        // And its curve lies above its tangents.
        let tangent = |i: usize, j: usize| f64::from(values[i].0) + (points[j] - points[i]) * slope(i);
        let below = |i: usize, j: usize| f64::from(values[j].0) < tangent(i, j) - 1e-4;
        assert!((0..points.len()).all(|i| (0..points.len()).all(|j| !below(i, j))));
    }
}

/// Gamma(zeta, z) = z.zeta - F(zeta): stationary at zeta = 0 and z = the attention output.
#[test]
fn the_stationary_point_of_the_bayesian_reading_is_the_attention_output() {
    for seed in 0..20 {
        // More keys than dimensions: F is strictly convex.
        let problem = Problem::new(5000 + seed, 30);
        let mut r = Rng::new(seed);
        let (lse, z) = problem.energy(None);
        let gamma = |zeta: &[f32], f: f32| -> f64 {
            z.iter().zip(zeta).map(|(&z, &x)| f64::from(z) * f64::from(x)).sum::<f64>() - f64::from(f)
        };
        // By z: zeta = 0. By zeta, at that z: no other point is higher,
        for size in [0.1, 1.0, 4.0] {
            for _ in 0..10 {
                let zeta: Vec<f32> = (0..DIM).map(|_| (size * r.normal()) as f32).collect();
                assert!(gamma(&zeta, problem.energy(Some(&zeta)).0) <= -f64::from(lse) + 2e-5);
            }
        }
        // and climbing from anywhere ends there.
        let mut zeta: Vec<f32> = (0..DIM).map(|_| r.normal() as f32).collect();
        for _ in 0..3000 {
            let (_, gradient) = problem.energy(Some(&zeta));
            zeta.iter_mut().zip(&z).zip(&gradient).for_each(|((x, z), g)| *x += 0.4 * (z - g));
        }
        let (f, gradient) = problem.energy(Some(&zeta));
        assert!(zeta.iter().all(|x| x.abs() < 1e-3), "{zeta:?}");
        assert!((gamma(&zeta, f) + f64::from(lse)).abs() < 1e-5);
        assert!(near(&gradient, &z.iter().map(|&z| f64::from(z)).collect::<Vec<_>>(), 1e-4), "{gradient:?} {z:?}");
    }
}

/// Many keys: several threads, with and without zeta, over scales of both signs and far from 1.
#[test]
fn many_keys_and_odd_scales() {
    for scale in [1e-25f32, -0.3, 1.0, -2.0] {
        let desc = AttentionDesc { scale, v_dtype: Dtype::Bf16, ..AttentionDesc::new(6, 2, 80, 5000) };
        let case = Case::plain(desc, 1, &[(5000, 2), (37, 1)], Values::Normal, 9);
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let mut found = Comparison::default();
        for _ in 0..2 {
            check(&case, &runtime, None, &mut found);
        }
        assert!(found.worst.max(found.worst_lse) <= 1.0, "{found:?}");
    }
}

/// What is added to scores may be as large as scores may be, however small the scale.
#[test]
fn huge_terms_beside_a_small_scale() {
    let mut problem = Problem::new(3, 2);
    problem.v = vec![0.0; 2 * DIM];
    (problem.v[0], problem.v[DIM]) = (1.0, 0.5);
    for scale in [0.125f32, -0.3, 1e-6, 2.0] {
        problem.desc.scale = scale;
        // F is near zeta v of the key that weighs all: 1e38 * 1, or -1e38 * 0.5.
        for (size, f, gradient) in [(1e38f32, 1e38f32, 1.0), (-1e38, -5e37, 0.5)] {
            let mut zeta = [0.0; DIM];
            zeta[0] = size;
            let found = problem.energy(Some(&zeta));
            assert!((found.0 - f).abs() <= 1e-6 * f.abs() && found.1[0] == gradient, "{scale}, {size:e}: {found:?}");
        }
        // A mask that adds as much to all keys leaves their weights alone, but for what rounding takes of their scores: all of it.
        let masked = AttentionDesc { mask: MaskKind::Additive, mask_dtype: Some(Dtype::F32), ..problem.desc };
        for size in [1e38f32, -1e38] {
            let mask = [size; 2];
            let (mut out, mut f) = (vec![0.0; DIM], 0.0);
            problem.with(&mut out, &mut f, |args| {
                let args = DecodeArgs { mask: Tensor::from_slice(&mask).with_strides([0, 0, 0, 4]), ..*args };
                // SAFETY: everything outlives the call.
                unsafe { energy(&problem.runtime, Device::CPU, &masked, &args, &Tensor::NULL, None) }.unwrap();
            });
            assert!((f - size).abs() <= 1e-6 * size.abs() && out[0] == 0.75, "{scale}, {size:e}: {f:e} {out:?}");
        }
    }
}

#[test]
fn what_is_refused_is_named() {
    let problem = Problem::new(1, 5);
    let run = |desc: &AttentionDesc, device: Device, zeta: &Tensor| -> Result<()> {
        let (mut out, mut f) = (vec![7.0; DIM], 7.0);
        let result = problem.with(&mut out, &mut f, |args| {
            // SAFETY: everything outlives the call.
            unsafe { energy(&problem.runtime, device, desc, args, zeta, None) }
        });
        assert!(result.is_ok() || (out == vec![7.0; DIM] && f == 7.0));
        result
    };
    let zeta = [0.0f32; DIM];
    run(&problem.desc, Device::CPU, &Tensor::from_slice(&zeta)).unwrap();
    for (name, desc, zeta) in [
        ("zeta.bytes", problem.desc, Tensor::from_slice(&zeta[1..])),
        ("kv_heads", AttentionDesc { kv_heads: 0, ..problem.desc }, Tensor::NULL),
        ("head_dim_v", AttentionDesc { head_dim_v: 0, ..problem.desc }, Tensor::NULL),
    ] {
        let error = run(&desc, Device::CPU, &zeta).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.message().starts_with(name), "{error}");
    }
    // Bad data: NaN, and said so.
    let (mut out, mut f, length) = (vec![7.0; DIM], 7.0, 6);
    let error = problem.with(&mut out, &mut f, |args| {
        let args = DecodeArgs { kv_length: &length, ..*args };
        // SAFETY: everything outlives the call.
        unsafe { energy(&problem.runtime, Device::CPU, &problem.desc, &args, &Tensor::NULL, None) }.unwrap_err()
    });
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    assert!(
        error.message().starts_with("kv_length[0]: found 6, wanted 0 to ")
            && out.iter().all(|x| x.is_nan())
            && f.is_nan()
    );
}
