//! Seeded random cases over everything that is accepted.

use treeattn::attention::KvLayout;

use crate::support::rng::Rng;
use crate::support::run::Pool;
use crate::support::{full, only_case, random, seed};

fn run(name: &str, layout: KvLayout, count: u64) {
    let (seed, mut pool) = (seed(), Pool::default());
    if let Some(case) = only_case() {
        return pool.check(&random::case(case, layout));
    }
    let count = if full() { 12 * count } else { count };
    println!("{name}: {count} cases, TREEATTN_SEED={seed}");
    let mut failures = Vec::new();
    for index in 0..count {
        let case = random::case(Rng::derive(seed, 3 * index + layout as u64), layout);
        if std::env::var_os("TREEATTN_TRACE").is_some() {
            eprintln!("{}", case.describe());
        }
        failures.extend(pool.try_check(&case).err());
    }
    assert!(
        failures.is_empty(),
        "{} of {count} cases failed, among them\n{}",
        failures.len(),
        failures[..failures.len().min(10)].join("\n")
    );
    pool.tally.finish_random(name);
}

#[test]
fn random_strided() {
    run("random_strided", KvLayout::Strided, 400);
}

#[test]
fn random_block_table() {
    run("random_block_table", KvLayout::BlockTable, 300);
}

#[test]
fn random_csr_pages() {
    run("random_csr_pages", KvLayout::CsrPages, 300);
}
