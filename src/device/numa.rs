//! NUMA nodes: which processors and how much memory each has, and threads and memory bound to one.
//!
//! Read from sysfs once. The kernel's calls are made directly: binding is a handful of words, and a library for them is not
//! everywhere. Binding is a preference: where the kernel refuses it, as in some containers, a thread or a buffer is as it was.

use std::ffi::c_void;
use std::path::Path;
use std::sync::OnceLock;

use super::environment::environment;

/// Processors that are told apart: as many as the largest kernel configurations have.
const MOST_CPUS: usize = 8192;
/// Nodes, as the kernel's.
const MOST_NODES: usize = 1024;
/// `MPOL_PREFERRED`: pages come from the node while it has some.
const PREFERRED: i32 = 1;

type CpuSet = [u64; MOST_CPUS / 64];

/// A NUMA node that has processors which this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// The kernel's number.
    number: usize,
    /// Its processors that this process may use, ascending; at least one.
    cpus: Vec<usize>,
    /// Bytes of memory, 0 where the system does not say.
    memory: u64,
}

/// The nodes of this machine, where there are several; none otherwise.
pub(crate) fn nodes() -> &'static [Node] {
    static NODES: OnceLock<Vec<Node>> = OnceLock::new();
    NODES.get_or_init(|| {
        let root = environment().sysfs.as_deref().unwrap_or("/sys".as_ref());
        let found = read(Path::new(root), &allowed_cpus());
        if found.len() > 1 { found } else { Vec::new() }
    })
}

impl Node {
    /// The kernel's number.
    pub fn number(&self) -> usize {
        self.number
    }

    /// How many processors of it this process may use.
    pub fn cores(&self) -> usize {
        self.cpus.len()
    }

    /// These processors as the kernel writes a list: "0-3,8".
    pub fn cpu_list(&self) -> String {
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for &cpu in &self.cpus {
            match parts.last_mut() {
                Some((_, last)) if *last + 1 == cpu => *last = cpu,
                _ => parts.push((cpu, cpu)),
            }
        }
        let word = |&(first, last): &(usize, usize)| {
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        };
        parts.iter().map(word).collect::<Vec<_>>().join(",")
    }

    /// Bytes of memory, 0 where the system does not say.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Lets the calling thread run on this node's processors alone, and take its memory there. Only for threads of the library's.
    pub fn bind_thread(&self) {
        let mut set: CpuSet = [0; MOST_CPUS / 64];
        for &cpu in &self.cpus {
            set[cpu / 64] |= 1 << (cpu % 64);
        }
        let nodes = self.mask();
        // SAFETY: both calls read the words that they are given, of the sizes that they are told, and change the calling thread
        // alone. A set of processors is a row of bits, of which cpu_set_t holds the first 1,024.
        unsafe {
            libc::sched_setaffinity(0, size_of_val(&set), set.as_ptr().cast());
            libc::syscall(libc::SYS_set_mempolicy, PREFERRED, nodes.as_ptr(), MOST_NODES + 1);
        }
    }

    /// Asks for pages of this node for memory of which none has been touched yet.
    ///
    /// # Safety
    /// `bytes` bytes from `start` on are whole pages of a private mapping of the caller's.
    pub unsafe fn bind_memory(&self, start: *mut c_void, bytes: usize) {
        let nodes = self.mask();
        // SAFETY: the caller's promise; where pages come from changes nothing that they hold.
        unsafe { libc::syscall(libc::SYS_mbind, start, bytes, PREFERRED, nodes.as_ptr(), MOST_NODES + 1, 0) };
    }

    fn mask(&self) -> [u64; MOST_NODES / 64] {
        let mut mask = [0; MOST_NODES / 64];
        mask[self.number / 64] |= 1 << (self.number % 64);
        mask
    }
}

/// The nodes below `root` (`/sys`) that have processors among `allowed`, ascending.
fn read(root: &Path, allowed: &CpuSet) -> Vec<Node> {
    let folder = root.join("devices/system/node");
    let text = |path: &str| std::fs::read_to_string(folder.join(path)).unwrap_or_default();
    let node = |number: usize| {
        let may_use = |cpu: &usize| allowed[cpu / 64] >> (cpu % 64) & 1 == 1;
        let cpus: Vec<usize> =
            list(&text(&format!("node{number}/cpulist")), MOST_CPUS).into_iter().filter(may_use).collect();
        let memory = memory(&text(&format!("node{number}/meminfo")));
        (!cpus.is_empty()).then_some(Node { number, cpus, memory })
    };
    list(&text("online"), MOST_NODES).into_iter().filter_map(node).collect()
}

/// The numbers below `end` of a list as the kernel writes it ("0-3,8"), ascending; none where it is no such list.
fn list(text: &str, end: usize) -> Vec<usize> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else { return Vec::new() };
        numbers.extend(first..last.saturating_add(1).min(end));
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// "Node 0 MemTotal:  65536 kB" in bytes; 0 where it does not stand there.
fn memory(text: &str) -> u64 {
    let line = text.lines().find(|line| line.contains("MemTotal:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().rev().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0).saturating_mul(1024)
}

/// The processors that the calling thread may use; all where the system does not say.
fn allowed_cpus() -> CpuSet {
    let mut set: CpuSet = [0; MOST_CPUS / 64];
    // SAFETY: the call writes at most the bytes that it is told of. Miri knows no such call.
    let failed = cfg!(miri) || unsafe { libc::sched_getaffinity(0, size_of_val(&set), set.as_mut_ptr().cast()) } != 0;
    if failed { [u64::MAX; MOST_CPUS / 64] } else { set }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: CpuSet = [u64::MAX; MOST_CPUS / 64];

    /// A folder as sysfs has it, removed in the end.
    struct Faked(std::path::PathBuf);

    impl Faked {
        fn new(name: &str, online: &str, nodes: &[(usize, &str, &str)]) -> Faked {
            let root = std::env::temp_dir().join(format!("treeattn-numa-{name}-{}", std::process::id()));
            let folder = root.join("devices/system/node");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("online"), online).unwrap();
            for (number, cpus, memory) in nodes {
                let node = folder.join(format!("node{number}"));
                std::fs::create_dir_all(&node).unwrap();
                std::fs::write(node.join("cpulist"), cpus).unwrap();
                std::fs::write(node.join("meminfo"), memory).unwrap();
            }
            Faked(root)
        }
    }

    impl Drop for Faked {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let cases: [(&str, &[usize]); 8] = [
            ("0\n", &[0]),
            ("0-3,8\n", &[0, 1, 2, 3, 8]),
            ("8,0-1,1", &[0, 1, 8]),
            ("", &[]),
            ("\n", &[]),
            ("a-b", &[]),
            ("3-1", &[]),
            ("14-99999999999", &[14, 15]),
        ];
        for (text, expected) in cases {
            assert_eq!(list(text, 16), expected, "{text:?}");
        }
    }

    #[test]
    fn nodes_without_processors_of_this_process_are_none() {
        let faked = Faked::new(
            "nodes",
            "0-3",
            &[
                (0, "0-3,16-19\n", "Node 0 MemTotal:       65536 kB\nNode 0 MemFree: 1 kB\n"),
                (1, "4-7", "Node 1 MemFree: 1 kB\n"),
                // Memory alone, as an expander has it.
                (2, "\n", "Node 2 MemTotal: 99 kB\n"),
            ],
        );
        let found = read(&faked.0, &ALL);
        let as_plain = |n: &Node| (n.number(), n.cpus.clone(), n.memory());
        let expected = vec![(0, vec![0, 1, 2, 3, 16, 17, 18, 19], 65536 << 10), (1, vec![4, 5, 6, 7], 0)];
        assert_eq!(found.iter().map(as_plain).collect::<Vec<_>>(), expected);
        assert_eq!(found.iter().map(Node::cpu_list).collect::<Vec<_>>(), ["0-3,16-19", "4-7"]);
        let mut few: CpuSet = [0; MOST_CPUS / 64];
        few[0] = 1 << 4 | 1 << 6 | 1 << 7;
        assert_eq!(read(&faked.0, &few)[0].cpu_list(), "4,6-7");
        few[0] = 1 << 6 | 1 << 7;
        assert_eq!(read(&faked.0, &few).iter().map(as_plain).collect::<Vec<_>>(), vec![(1, vec![6, 7], 0)]);
        assert_eq!(read(Path::new("/nowhere"), &ALL), []);
    }

    #[test]
    fn a_bound_thread_stays_on_its_node() {
        let allowed = allowed_cpus();
        let last = (0..MOST_CPUS).rev().find(|cpu| allowed[cpu / 64] >> (cpu % 64) & 1 == 1).unwrap();
        // Node 0 is on every machine, so that the kernel takes the policy.
        let node = Node { number: 0, cpus: vec![last], memory: 0 };
        let seen = std::thread::spawn(move || {
            node.bind_thread();
            let mut policy = 0;
            // SAFETY: writes one int; asks for no nodes and no address.
            let refused = unsafe {
                libc::syscall(
                    libc::SYS_get_mempolicy,
                    &mut policy,
                    std::ptr::null_mut::<u64>(),
                    0,
                    std::ptr::null_mut::<u8>(),
                    0,
                )
            };
            (allowed_cpus(), refused == 0, policy)
        });
        let (set, answered, policy) = seen.join().unwrap();
        let mut expected: CpuSet = [0; MOST_CPUS / 64];
        expected[last / 64] = 1 << (last % 64);
        assert_eq!(set, expected);
        // Containers may forbid both calls.
        assert!(!answered || policy == PREFERRED || policy == 0, "{policy}");
        assert_eq!(allowed_cpus(), allowed, "the calling thread is as it was");
    }
}
