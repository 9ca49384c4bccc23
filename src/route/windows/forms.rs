//! How a step's partials come to the exchange, by the step's size.

use crate::cuda::COMMUNICATORS;
use crate::device::environment;
use crate::error::{Error, Result};

/// The environment variable that picks a [`Form`] where the step's size allows it: "memory", "push" or "single". With "nccl"
/// exchanges that have the choice go over NCCL instead of windows.
const ENVIRONMENT: &str = "TREEATTN_GPU_EXCHANGE";
/// Most blocks of an attention kernel that may wait for ranks that have not come.
const MOST_WAITING: i64 = 16;

/// How a step's partials come to the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Attention leaves the partial in the plan's workspace; an exchange kernel for each slotful of rows pushes and merges.
    Memory,
    /// Attention pushes rows as it completes them; one exchange kernel merges.
    Push,
    /// Attention pushes rows, and its blocks merge.
    Single,
}

impl Form {
    /// The form that [`ENVIRONMENT`] asked for when the process made its first runtime.
    pub fn asked() -> Result<Option<Form>> {
        let Some(word) = &environment().gpu_exchange else { return Ok(None) };
        match word.to_str() {
            Some("memory") => Ok(Some(Form::Memory)),
            Some("push") => Ok(Some(Form::Push)),
            Some("single") => Ok(Some(Form::Single)),
            Some("nccl") => Ok(None),
            _ => Err(Error::invalid(ENVIRONMENT, word.display(), "\"memory\", \"push\", \"single\" or \"nccl\"")),
        }
    }

    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Form::Memory => "pushed and merged by kernels of their own",
            Form::Push => "pushed by the attention kernel, merged by another",
            Form::Single => "pushed and merged by the attention kernel",
        }
    }
}

/// What forms a plan's steps can take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forms {
    asked: Option<Form>,
    /// Rows that a slot holds.
    pub most_rows: i64,
    /// Blocks of the attention kernel that may wait for ranks that have not come.
    pub most_waiting: i64,
}

impl Forms {
    /// For one of `sharing` ranks on a GPU of `units` multiprocessors.
    pub fn new(asked: Option<Form>, most_rows: i64, units: i32, sharing: usize) -> Forms {
        let most_waiting = (i64::from(units) / (i64::from(COMMUNICATORS) * sharing.max(1) as i64)).min(MOST_WAITING);
        Forms { asked, most_rows, most_waiting }
    }

    /// The form of a step of `rows` rows.
    pub fn of(&self, rows: i64) -> Form {
        match self.asked {
            _ if rows == 0 || rows > self.most_rows => Form::Memory,
            Some(form @ (Form::Memory | Form::Push)) => form,
            _ if self.most_waiting > 0 => Form::Single,
            _ => Form::Push,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_follow_the_size_of_a_step_and_leave_room_for_others() {
        let forms = Forms::new(None, 1000, 132, 1);
        use Form::{Memory, Push, Single};
        assert_eq!([0, 1, 1000, 1001].map(|rows| forms.of(rows)), [Memory, Single, Single, Memory]);
        assert_eq!(forms.most_waiting, 16);
        assert_eq!(Forms::new(None, 1000, 132, 8).most_waiting, 4);
        assert_eq!(Forms::new(Some(Single), 1000, 4, 2).of(1), Push, "no room to wait");
        assert_eq!(Forms::new(Some(Memory), 1000, 132, 1).of(1), Memory);
    }
}
