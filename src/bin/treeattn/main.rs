//! The command line: what the library finds on this machine (`info`), whether it is right here (`verify`), and how fast
//! (`bench`); and what many GPUs would take (`simulate`). Thin over the library's public API.

mod bench;
mod gpus;
mod info;
mod machine;
mod outcome;
mod plot;
mod simulate;
mod table;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exact decode attention over a KV cache sharded along the sequence.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints the version, the devices and what was chosen for them.
    Info(info::Args),
    /// Checks a grid of shapes against float64 sums on this machine, a line each; fails if one does.
    Verify(verify::Args),
    /// Times decode steps and exchanges on CPU ranks, or decode steps on a GPU, beside what the machine can do at most.
    Bench(Box<bench::Args>),
    /// Predicts what steps over many GPUs take, by a cost model, and says how many GPUs and which algorithm pay.
    Simulate(simulate::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Info(args) => info::run(&args).map(|()| true),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args).map(|()| true),
        Command::Simulate(args) => simulate::run(&args).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("treeattn: {error}");
            ExitCode::from(2)
        }
    }
}
