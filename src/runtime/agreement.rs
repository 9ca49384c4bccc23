//! How ranks find out that they make the same plan.

use crate::attention::AttentionDesc;
use crate::error::{Error, ErrorKind, Result};

/// What must agree beside the descriptor, by name, or why the plan cannot be made.
type More<'a> = std::result::Result<Vec<(&'static str, String)>, &'a Error>;

/// What a rank tells its peers before a plan exists: the fields of its descriptor and what else must agree, or why it cannot
/// make the plan. `plans`: how many its communicator has.
pub(super) fn encode(plans: u64, desc: &AttentionDesc, more: More<'_>) -> Vec<u8> {
    let mut text = String::new();
    if let Err(error) = &more {
        text.push_str(&format!("error={}\n", error.message().replace('\n', " ")));
    }
    text.push_str(&format!("library version={}\n", env!("CARGO_PKG_VERSION")));
    text.push_str(&format!("plans created before={plans}\n"));
    for (name, value) in desc.fields() {
        text.push_str(&format!("{name}={value}\n"));
    }
    for (name, value) in more.unwrap_or_default() {
        text.push_str(&format!("{name}={value}\n"));
    }
    text.into_bytes()
}

/// `Mismatch` for the first field in which the ranks differ, or the first rank that cannot make the plan.
pub(super) fn compare(blobs: &[Vec<u8>]) -> Result<()> {
    let texts: Vec<String> = blobs.iter().map(|blob| String::from_utf8_lossy(blob).into_owned()).collect();
    for (rank, text) in texts.iter().enumerate() {
        if let Some(error) = text.strip_prefix("error=") {
            let reason = error.lines().next().unwrap_or_default();
            let message = format!("rank {rank} could not make the plan: {reason}");
            return Err(Error::new(ErrorKind::Mismatch, message).with_rank(rank as i32));
        }
    }
    let first: Vec<_> = texts[0].lines().collect();
    for (line, &wanted) in first.iter().enumerate() {
        let values: Vec<_> = texts.iter().map(|text| text.lines().nth(line).unwrap_or_default()).collect();
        if values.iter().all(|&value| value == wanted) {
            continue;
        }
        let name = wanted.split('=').next().unwrap_or_default();
        let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
        for (rank, value) in values.iter().enumerate() {
            let value = value.split_once('=').map_or(*value, |(_, value)| value);
            match groups.iter_mut().find(|(seen, _)| *seen == value) {
                Some((_, ranks)) => ranks.push(rank),
                None => groups.push((value, vec![rank])),
            }
        }
        let odd = groups.iter().min_by_key(|(_, ranks)| ranks.len()).map_or(0, |(_, ranks)| ranks[0]);
        let listed: Vec<_> = groups.iter().map(|(value, ranks)| format!("{value} on ranks {ranks:?}")).collect();
        let message = format!("{name}: found {}, wanted the same on every rank", listed.join(" and "));
        return Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd as i32));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_and_the_minority_are_named() {
        let desc = AttentionDesc::new(4, 2, 64, 100);
        let same = || encode(3, &desc, Ok(vec![("threads_per_rank", "2".into())]));
        compare(&[same(), same(), same()]).unwrap();
        let other = || encode(3, &desc, Ok(vec![("threads_per_rank", "4".into())]));
        assert_eq!(compare(&[other(), same(), same()]).unwrap_err().rank(), Some(0));
        let error = compare(&[same(), other(), same()]).unwrap_err();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(1)));
        assert!(error.message().starts_with("threads_per_rank: found 2 on ranks [0, 2] and 4 on ranks [1]"), "{error}");
        let error = compare(&[same(), same(), encode(4, &desc, Ok(Vec::new()))]).unwrap_err();
        assert!(error.message().starts_with("plans created before") && error.rank() == Some(2), "{error}");
        let wider = encode(3, &AttentionDesc { q_heads: 8, ..desc }, Ok(Vec::new()));
        assert!(compare(&[same(), wider]).unwrap_err().message().starts_with("q_heads"));
        let failed = encode(3, &desc, Err(&Error::new(ErrorKind::NoMemory, "none\nleft")));
        let error = compare(&[same(), failed]).unwrap_err();
        assert!(error.message() == "rank 1 could not make the plan: none left" && error.rank() == Some(1), "{error}");
    }
}
