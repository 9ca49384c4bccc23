//! Ranks that are processes: this test executable, started again for each, in one network or in several.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use treeattn::ErrorKind;

use crate::mesh::{self, LONG, Meeting, Mesh};
use crate::rank::{self, Outcome, Way};
use crate::trial::{Fault, Place, Trial};

/// Tells a process that it is a rank, and which: place, seed, rank, folder.
const CHILD: &str = "TREEATTN_TEST_FAULT_RANK";
/// Tells a process that it runs in network namespaces that it may change.
const INSIDE: &str = "TREEATTN_TEST_NAMESPACES";
/// Network namespaces, one for each rank.
const HOSTS: usize = 3;

/// One trial: a process a rank, each started by `wrap` for its rank. None: a rank that was killed.
pub fn run(trial: &Trial, wrap: &[&str]) -> Vec<Option<Outcome>> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let unique = format!("faults{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique);
    std::fs::create_dir_all(folder.join("again")).unwrap();
    let test = std::env::current_exe().unwrap();
    let mut children: Vec<_> = (0..trial.world)
        .map(|rank| {
            let rank = rank.to_string();
            let mut words: Vec<String> = wrap.iter().map(|word| word.replace("RANK", &rank)).collect();
            words.push(test.display().to_string());
            Command::new(&words[0])
                .args(&words[1..])
                .args(["--exact", "child", "--nocapture"])
                .env(CHILD, format!("{} {} {rank} {}", trial.place as u8, trial.seed, folder.display()))
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let until = Instant::now() + 2 * LONG;
    let outcomes = children
        .iter_mut()
        .enumerate()
        .map(|(rank, child)| {
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status,
                    None if Instant::now() > until => {
                        child.kill().unwrap();
                        panic!("rank {rank} hangs: {trial:?}");
                    }
                    None => std::thread::sleep(Duration::from_millis(2)),
                }
            };
            let killed = rank == trial.victim && trial.fault == Fault::Killed;
            assert_eq!(status.success(), !killed, "rank {rank}: {status}, {trial:?}");
            (!killed).then(|| read(&folder.join(format!("outcome{rank}"))))
        })
        .collect();
    std::fs::remove_dir_all(&folder).unwrap();
    outcomes
}

/// The life of a process that is a rank.
pub fn child() {
    let Ok(words) = std::env::var(CHILD) else { return };
    let words: Vec<&str> = words.splitn(4, ' ').collect();
    let place = [Place::Local, Place::Sockets, Place::Processes, Place::Namespaces][words[0].parse::<usize>().unwrap()];
    let trial = Trial::new(place, words[1].parse().unwrap());
    let (rank, folder): (usize, PathBuf) = (words[2].parse().unwrap(), words[3].into());
    let again = folder.join("again");
    let (first_hosts, again_hosts) = (hosts(&trial, 0), hosts(&trial, 1));
    let meeting =
        |folder, hosts| if place == Place::Namespaces { Meeting::Hosts(hosts) } else { Meeting::Folder(folder) };
    let first = Mesh::process(&meeting(&folder, &first_hosts), rank, trial.world);
    // Made when it is first needed; lives as long as the communicator over it.
    let second = std::cell::OnceCell::new();
    let connect = || mesh::connect(&first, &trial.config());
    let reconnect = |rank: usize| {
        let mesh = second.get_or_init(|| Mesh::process(&meeting(&again, &again_hosts), rank, trial.survivors().len()));
        mesh::connect(mesh, &trial.patient_config())
    };
    let outcome = rank::run(&trial, rank, &Way { connect: &connect, reconnect: &reconnect, mesh: Some(&first) });
    write(&folder.join(format!("outcome{rank}")), &outcome);
}

/// Addresses where ranks listen, each in its namespace: `time` 0, all ranks at the beginning; 1, those that are left.
fn hosts(trial: &Trial, time: u16) -> Vec<SocketAddr> {
    // Below the ports that the system gives to outgoing connections.
    let port = 2048 + (trial.seed % 14_000) as u16 * 2 + time;
    let ranks = if time == 0 { (0..trial.world).collect() } else { trial.survivors() };
    ranks.into_iter().map(|rank| SocketAddr::from(([10, 77, 0, 1 + rank as u8], port))).collect()
}

fn write(path: &Path, outcome: &Outcome) {
    let error = outcome.error.map_or("- 0 0".to_string(), |(kind, blamed, took)| {
        format!("{} {} {}", kind.code(), blamed.unwrap_or(-1), took.as_micros())
    });
    let text = format!("{} {} {error} {}", outcome.done, outcome.fresh, outcome.wrong.as_deref().unwrap_or(""));
    std::fs::write(path, text).unwrap();
}

fn read(path: &Path) -> Outcome {
    let text = std::fs::read_to_string(path).unwrap();
    let words: Vec<&str> = text.splitn(6, ' ').collect();
    let known = [
        ErrorKind::Timeout,
        ErrorKind::Transport,
        ErrorKind::Desync,
        ErrorKind::Mismatch,
        ErrorKind::Aborted,
        ErrorKind::PeerLost,
        ErrorKind::ParentDestroyed,
    ];
    let error = (words[2] != "-").then(|| {
        let code: i32 = words[2].parse().unwrap();
        let kind = known.into_iter().find(|kind| kind.code() == code).unwrap_or(ErrorKind::Internal);
        let blamed: i32 = words[3].parse().unwrap();
        (kind, (blamed >= 0).then_some(blamed), Duration::from_micros(words[4].parse().unwrap()))
    });
    let wrong = Some(words[5].to_string()).filter(|text| !text.is_empty());
    Outcome { done: words[0].parse().unwrap(), fresh: words[1] == "true", error, wrong }
}

/// Runs test `name` of this executable where it may make network namespaces, or says why it cannot.
pub fn enter_namespaces(name: &str) {
    let probe = unshare().args(["sh", "-c", &setup()]).stdout(Stdio::null()).stderr(Stdio::piped()).output();
    match probe {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            return println!(
                "skipped: no network namespaces here: {}",
                why.lines().last().unwrap_or("no reason given")
            );
        }
        Err(error) => return println!("skipped: no network namespaces here: unshare: {error}"),
    }
    let script = format!("{} && exec \"$0\" --exact {name} --nocapture", setup());
    let status = unshare().args(["sh", "-c", &script]).arg(std::env::current_exe().unwrap()).env(INSIDE, "1").status();
    assert!(status.unwrap().success());
}

pub fn inside_namespaces() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A trial with a namespace a rank. A network link that was taken down is up again for the next trial.
pub fn run_in_namespaces(trial: &Trial) -> Vec<Option<Outcome>> {
    let outcomes = run(trial, &["ip", "netns", "exec", "rankRANK"]);
    if trial.fault == Fault::Unplugged {
        let rank = format!("rank{}", trial.victim);
        assert!(Command::new("ip").args(["-n", &rank, "link", "set", "eth0", "up"]).status().unwrap().success());
    }
    outcomes
}

/// A process that is root of namespaces of its own: of users, of mounts, of the network. All ends with it.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--net", "--kill-child", "--fork"]);
    command
}

/// A bridge with a namespace a rank at its ports.
fn setup() -> String {
    let mut script = String::from(
        "set -e; mount -t tmpfs none /run; mkdir -p /run/netns; ip link set lo up; ip link add bridge0 type bridge; \
         ip link set bridge0 up",
    );
    for rank in 0..HOSTS {
        script.push_str(&format!(
            "; ip netns add rank{rank}; ip link add port{rank} type veth peer name eth0 netns rank{rank}; \
             ip link set port{rank} master bridge0 up; ip -n rank{rank} addr add 10.77.0.{}/24 dev eth0; \
             ip -n rank{rank} link set lo up; ip -n rank{rank} link set eth0 up",
            rank + 1
        ));
    }
    script
}
