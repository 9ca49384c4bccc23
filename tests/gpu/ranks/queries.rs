//! Queries that ranks have by heads, gathered before a step: the bits of steps that every rank passes all queries to.

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, Dtype, KvLayout, OutputMode, QueryInput, Shard, Tensor, head_range};
use treeattn::runtime::Plan;

use super::{LONG, counts};
use crate::group::{Group, ranks};
use crate::numerics::shape;
use crate::space::{self, Shapes};
use crate::support::case::Case;
use crate::support::rank::Rank;
use crate::support::rng::Rng;
use crate::support::run::judge;
use crate::support::seed;
use crate::support::values::Values;

/// The bits of a case, of ranks that pass the queries that `input` says.
fn bits(group: &Group, case: &Case, input: QueryInput) -> (Vec<Rank>, Vec<Vec<u32>>) {
    let case = Case { desc: AttentionDesc { query_input: input, ..case.desc }, ..case.clone() };
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    all.iter_mut().for_each(|rank| rank.prefill(0xff));
    let mirrors = group.mirrors(&all);
    group.step(&plans, &mirrors, &mut all);
    let bits = all.iter().map(|rank| rank.bits(&case)).collect();
    (all, bits)
}

/// Asserts that a case has the same bits with queries by heads, and gives the ranks.
fn assert_same(group: &Group, case: &Case) -> Vec<Rank> {
    let (_, wanted) = bits(group, case, QueryInput::Replicated);
    let (all, found) = bits(group, case, QueryInput::Scattered);
    assert!(found == wanted, "other bits: {}", case.describe());
    all
}

/// Random cases of every layout, in turn over one GPU and over two.
pub fn same_bits(count: u64) {
    let counts = counts();
    for layout in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages] {
        for index in 0..count {
            let case = space::sharded(Rng::derive(seed() ^ 0x79, 3 * index + layout as u64), layout, Shapes::All);
            let group = Group::over(case.world, counts[index as usize % counts.len()], LONG);
            assert_same(&group, &case);
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}

/// Up to four ranks, of which some have no heads and all but one no keys, against float64: queries of any type, drafts and single
/// tokens in one batch.
pub fn heads_and_shards() {
    for (n, (world, heads)) in [(2, (5, 1)), (3, (6, 2)), (4, (3, 3)), (4, (8, 2))].into_iter().enumerate() {
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        for output in [OutputMode::Replicated, OutputMode::Scattered] {
            let q_dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][n % 3];
            let base =
                AttentionDesc { q_dtype, output, out_dtype: Dtype::F32, ..shape(heads.0, heads.1, 64, Dtype::F16) };
            let desc = AttentionDesc { causal: true, ..base };
            let mut case = Case::plain(desc, world, &[(90, 1), (40, 4), (0, 1), (33, 2)], Values::Normal, 4);
            for holder in [None, Some(n % world)] {
                for sequence in case.sequences.iter_mut().filter(|_| holder.is_some()) {
                    sequence.held = vec![Vec::new(); world];
                    sequence.held[n % world] = (0..sequence.keys).collect();
                }
                case.desc.max_kv_length = 90;
                let all = assert_same(&group, &case);
                let case =
                    Case { desc: AttentionDesc { query_input: QueryInput::Scattered, ..case.desc }, ..case.clone() };
                assert_eq!(judge(&case, &all).unwrap().failure, None);
            }
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}

/// More queries of a rank than a slot holds, in turn with small steps of the same plan.
pub fn slotfuls() {
    let group = Group::over(2, counts().pop().unwrap(), LONG);
    let (query_input, output) = (QueryInput::Scattered, OutputMode::Scattered);
    let base = AttentionDesc { query_input, output, q_dtype: Dtype::F32, ..shape(15, 1, 256, Dtype::F16) };
    // 1,048 rows of 1 KiB of the rank that has eight heads; a slot has 1 MiB.
    let large = Case::plain(AttentionDesc { head_dim_v: 64, ..base }, 2, &[(20, 100), (9, 31)], Values::Normal, 8);
    let small = Case::plain(large.desc, 2, &[(18, 1), (0, 1)], Values::Normal, 9);
    let plans = group.plans(&large.desc);
    for _ in 0..2 {
        for case in [&large, &small] {
            let mut all = ranks(case);
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            assert_eq!(judge(case, &all).unwrap().failure, None);
        }
    }
    assert_eq!(plans[0].stats().unwrap().rounds, 2 * ((2 + 1) + (1 + 1)), "two slotfuls of queries and one of rows");
    assert!(group.errors().into_iter().flatten().next().is_none());
}

/// What a plan says that it sends and holds beside one with the queries of all heads.
pub fn accounts() {
    for world in [2, 3] {
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        let desc = AttentionDesc { q_dtype: Dtype::Bf16, ..shape(5, 1, 64, Dtype::F16) };
        let case = Case::plain(desc, world, &[(40, 3), (0, 1)], Values::Normal, 5);
        let plans = QueryInput::ALL.map(|query_input| {
            let case = Case { desc: AttentionDesc { query_input, ..case.desc }, ..case.clone() };
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            plans
        });
        for rank in 0..world {
            let [all, own] = plans.each_ref().map(|plans| plans[rank].stats().unwrap());
            let (others, shard) = (world as u64 - 1, Shard { rank: rank as i32, world: world as i32 });
            let rows = 4 * head_range(5, shard).unwrap().len() as u64;
            let more = (own.rounds - all.rounds, own.messages - all.messages, own.bytes_sent - all.bytes_sent);
            assert_eq!(more, (1, others, others * rows * 128), "rank {rank} of {world}");
            let [all, own] = plans.each_ref().map(|plans| plans[rank].memory().unwrap());
            assert_eq!((own.workspace - all.workspace, own.window), (4 * 5 * 128, all.window));
        }
    }
}

/// What there is no gather for is refused; a call that is refused sends nothing; a partial takes the queries of all heads.
pub fn refusals() {
    let group = Group::over(2, counts().pop().unwrap(), LONG);
    let desc =
        AttentionDesc { query_input: QueryInput::Scattered, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    let local = AttentionDesc { output: OutputMode::Local, ..desc };
    let error = Plan::create_all(&group.comms.iter().collect::<Vec<_>>(), &local).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("query_input: found SCATTERED"), "{error}");
    let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    let mut args = mirrors[0].args;
    let host = [0u8; 8 * 64 * 2];
    args.out.data = host.as_ptr().cast_mut().cast();
    // SAFETY: the call is refused.
    let error = unsafe { plans[0].decode(&args, Some(&group.gpus[0].stream)) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    let args = treeattn::attention::DecodeArgs { q: Tensor { bytes: 64 * 2, ..mirrors[0].args.q }, ..mirrors[0].args };
    // SAFETY: the call is refused.
    let error = unsafe { plans[0].partial(&args, Some(&group.gpus[0].stream)) }.unwrap_err();
    assert!(error.message().starts_with("q."), "{error}");
    group.step(&plans, &mirrors, &mut all);
    assert_eq!(judge(&case, &all).unwrap().failure, None);
    assert!(group.errors().into_iter().flatten().next().is_none());
}
