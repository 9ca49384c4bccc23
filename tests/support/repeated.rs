//! A cache of a few pages that repeat: it holds any number of keys, and float64 answers for it at once, by how often each comes.

use treeattn::attention::reference::{Arithmetic, Reference};
use treeattn::attention::{AttentionDesc, KvLayout, ScoreMod};

/// One query token, one kv head, `group` query heads, over pages of `page` keys; all
/// numbers are those of the types of k, v and q.
pub struct Repeated {
    pub desc: AttentionDesc,
    pub q: Vec<f32>,
    /// [page, slot, dim] of the distinct pages.
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// For each rank: pages in order, each with how often it comes in a row; and the keys, which may leave the last page short.
    pub ranks: Vec<(Vec<(usize, usize)>, usize)>,
}

impl Repeated {
    pub fn new(group: usize, dim_qk: usize, dim_v: usize, page: usize) -> Repeated {
        let mut desc = AttentionDesc::new(group as i32, 1, dim_qk as i32, i32::MAX);
        desc.head_dim_v = dim_v as i32;
        (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, page as i32);
        Repeated { desc, q: vec![0.0; group * dim_qk], k: Vec::new(), v: Vec::new(), ranks: Vec::new() }
    }

    /// A page of as many keys as it has, by slot.
    pub fn page(&mut self, mut k: impl FnMut(usize) -> Vec<f32>, mut v: impl FnMut(usize) -> Vec<f32>) {
        for slot in 0..self.desc.page_size as usize {
            self.k.extend(k(slot));
            self.v.extend(v(slot));
        }
    }

    /// `keys` keys of one page, again and again, on one more rank.
    pub fn rank_of(&mut self, page: usize, keys: usize) {
        self.ranks.push((vec![(page, keys.div_ceil(self.desc.page_size as usize))], keys));
    }

    /// The pages of rank `rank`, in order.
    pub fn table(&self, rank: usize) -> Vec<i32> {
        self.ranks[rank].0.iter().flat_map(|&(page, count)| std::iter::repeat_n(page as i32, count)).collect()
    }

    /// Distinct pages.
    pub fn pages(&self) -> usize {
        self.v.len() / (self.desc.head_dim_v as usize * self.desc.page_size as usize)
    }

    /// What float64 answers.
    pub fn reference(&self) -> Reference {
        let desc = &self.desc;
        let (heads, dim_qk, dim) = (desc.q_heads as usize, desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let page = desc.page_size as usize;
        let pages = self.pages();
        let mut counts = vec![0u64; pages * page];
        for (runs, keys) in &self.ranks {
            let mut left = *keys;
            for &(which, times) in runs {
                let whole = times.min(left / page);
                counts[which * page..(which + 1) * page].iter_mut().for_each(|count| *count += whole as u64);
                left -= whole * page;
                if whole < times && left > 0 {
                    counts[which * page..][..left].iter_mut().for_each(|count| *count += 1);
                    left = 0;
                }
            }
            assert_eq!(left, 0, "pages for every key");
        }
        let keys: u64 = counts.iter().sum();
        let mut reference = Reference {
            dim,
            o: vec![0.0; heads * dim],
            lse: vec![0.0; heads],
            weighted: vec![0.0; heads * dim],
            largest: vec![0.0; heads * dim],
            score: vec![0.0; heads],
            keys: vec![keys; heads],
            least_weight: 2f64.powi(-126),
            least_value: 0.0,
            dim_qk,
            biased: false,
            mods: ScoreMod::PLAIN,
            scaled: [false; 2],
            partials: self.ranks.len() as u32,
            arithmetic: Arithmetic::ANY,
            fault: None,
        };
        let scale = f64::from(desc.effective_scale());
        for head in 0..heads {
            let q = &self.q[head * dim_qk..][..dim_qk];
            let live = || (0..pages * page).filter(|&slot| counts[slot] > 0);
            let mut scores = vec![0.0; pages * page];
            for slot in live() {
                let products = q.iter().zip(&self.k[slot * dim_qk..]).map(|(&q, &k)| f64::from(q) * f64::from(k));
                scores[slot] = scale * products.clone().sum::<f64>();
                let magnitude = scale.abs() * products.map(f64::abs).sum::<f64>();
                reference.score[head] = reference.score[head].max(magnitude);
            }
            let max = live().map(|slot| scores[slot]).fold(f64::NEG_INFINITY, f64::max);
            let mut sum = 0.0;
            for slot in live() {
                let weight = counts[slot] as f64 * (scores[slot] - max).exp();
                sum += weight;
                for d in 0..dim {
                    let (v, at) = (f64::from(self.v[slot * dim + d]), head * dim + d);
                    reference.o[at] += weight * v;
                    reference.weighted[at] += weight * v.abs();
                    reference.largest[at] = reference.largest[at].max(v.abs());
                }
            }
            for at in head * dim..(head + 1) * dim {
                reference.o[at] /= sum;
                reference.weighted[at] /= sum;
            }
            reference.lse[head] = max + sum.ln();
        }
        reference
    }
}
