//! An engine's transport made of sockets, one between every two ranks, and what can go wrong with it.

#![allow(dead_code)] // every test executable uses its own part

use std::ffi::c_void;
use std::fs::File;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use treeattn::Result;
use treeattn::runtime::{CommConfig, Communicator, Device, Runtime, RuntimeConfig, Transport};

/// A guard against hangs; nothing takes this long.
pub const LONG: Duration = Duration::from_secs(30);

/// The callbacks do as they should.
pub const WHOLE: i32 = 0;
/// They fail at once.
pub const FAIL: i32 = 1;
/// They close every socket with half of a message sent.
pub const CUT: i32 = 2;
/// They bring something else than was sent.
pub const GARBAGE: i32 = 3;
/// Between two ranks nothing moves until the time is over.
pub const STUCK: i32 = 4;

/// They bring another number wherever one of 32 bits is `LIE_ABOUT`.
pub const LIE: i32 = 5;
/// What they lie about.
pub const LIE_ABOUT: i32 = 9;

/// What a callback that was told to fail returns.
pub const CODE: i32 = 4242;

/// One rank's sockets to all others.
pub struct Mesh {
    pub rank: usize,
    peers: Vec<Option<File>>,
    /// What goes wrong from now on.
    pub fault: AtomicI32,
    /// Not 0: waits for the abort word alone, whatever the timeout.
    pub deaf: AtomicI32,
}

/// Where ranks that are processes meet.
pub enum Meeting<'a> {
    /// A socket in this folder a rank.
    Folder(&'a Path),
    /// This port of a host a rank.
    Hosts(&'a [SocketAddr]),
}

/// Two connected sockets.
pub type Pairs = fn() -> (OwnedFd, OwnedFd);

pub fn unix_pairs() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().unwrap();
    (a.into(), b.into())
}

pub fn tcp_pairs() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (b, _) = listener.accept().unwrap();
    a.set_nodelay(true).unwrap();
    b.set_nodelay(true).unwrap();
    (a.into(), b.into())
}

impl Mesh {
    /// The meshes of ranks that are threads.
    pub fn threads(world: usize, pairs: Pairs) -> Vec<Mesh> {
        let mut all: Vec<Vec<Option<OwnedFd>>> = (0..world).map(|_| (0..world).map(|_| None).collect()).collect();
        for (a, b) in (0..world).flat_map(|a| (a + 1..world).map(move |b| (a, b))) {
            let (x, y) = pairs();
            (all[a][b], all[b][a]) = (Some(x), Some(y));
        }
        all.into_iter().enumerate().map(|(rank, peers)| Mesh::new(rank, peers)).collect()
    }

    /// The mesh of a rank that is a process: it listens for higher ranks and calls lower ones.
    pub fn process(meeting: &Meeting, rank: usize, world: usize) -> Mesh {
        let mut peers: Vec<Option<OwnedFd>> = (0..world).map(|_| None).collect();
        let until = Instant::now() + LONG;
        let calling = |call: &dyn Fn() -> std::io::Result<OwnedFd>| loop {
            match call() {
                Ok(socket) => break socket,
                Err(error) => assert!(Instant::now() < until, "rank {rank} reaches nobody: {error}"),
            }
            thread::sleep(Duration::from_millis(2));
        };
        let accept: Box<dyn Fn() -> OwnedFd> = match meeting {
            Meeting::Folder(folder) => {
                let listener = UnixListener::bind(path(folder, rank)).unwrap();
                Box::new(move || listener.accept().unwrap().0.into())
            }
            Meeting::Hosts(hosts) => {
                let listener = TcpListener::bind(hosts[rank]).unwrap();
                Box::new(move || {
                    let socket = listener.accept().unwrap().0;
                    socket.set_nodelay(true).unwrap();
                    socket.into()
                })
            }
        };
        for (peer, slot) in peers.iter_mut().enumerate().take(rank) {
            let socket = calling(&|| match meeting {
                Meeting::Folder(folder) => Ok(UnixStream::connect(path(folder, peer))?.into()),
                Meeting::Hosts(hosts) => {
                    let socket = TcpStream::connect_timeout(&hosts[peer], Duration::from_secs(1))?;
                    socket.set_nodelay(true)?;
                    Ok(socket.into())
                }
            });
            let mut file = File::from(socket);
            file.write_all(&[rank as u8]).unwrap();
            *slot = Some(file.into());
        }
        for _ in rank + 1..world {
            let mut file = File::from(accept());
            let mut who = [0];
            file.read_exact(&mut who).unwrap();
            peers[who[0] as usize] = Some(file.into());
        }
        Mesh::new(rank, peers)
    }

    fn new(rank: usize, peers: Vec<Option<OwnedFd>>) -> Mesh {
        let open = |socket: OwnedFd| {
            // SAFETY: a descriptor of our own; no memory is passed.
            let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
            // SAFETY: as above.
            let set = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
            assert!(flags >= 0 && set == 0);
            File::from(socket)
        };
        let peers = peers.into_iter().map(|peer| peer.map(open)).collect();
        Mesh { rank, peers, fault: AtomicI32::new(WHOLE), deaf: AtomicI32::new(0) }
    }

    /// Closes every connection, as the end of a process does.
    pub fn cut(&self) {
        for peer in self.peers.iter().flatten() {
            // SAFETY: a descriptor of our own; no memory is passed.
            unsafe { libc::shutdown(peer.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }

    /// The callbacks over these sockets. The mesh outlives the communicators made of them.
    pub fn transport(&self, stream_threads: bool) -> Transport {
        let ctx = (self as *const Mesh).cast_mut().cast();
        Transport { ctx, allgather, sendrecv: Some(sendrecv), stream_threads }
    }

    /// The ranks.
    pub fn world(&self) -> usize {
        self.peers.len()
    }

    /// Moves all of `flows`, whoever is ready; 0, or why not.
    fn exchange(&self, flows: &mut [Flow<'_>], give_up: impl Fn() -> bool) -> i32 {
        match self.fault.load(Ordering::Relaxed) {
            FAIL => return CODE,
            CUT => {
                for flow in flows.iter_mut() {
                    flow.send = &flow.send[..flow.send.len() / 2];
                }
                let _ = self.move_all(flows, &|| true);
                self.cut();
                return 9;
            }
            _ => {}
        }
        let code = self.move_all(flows, &give_up);
        let received = flows.iter_mut().map(|flow| &mut *flow.recv);
        match self.fault.load(Ordering::Relaxed) {
            GARBAGE if code == 0 => received.flatten().for_each(|byte| *byte ^= 0x55),
            LIE if code == 0 => {
                for word in received.flat_map(|bytes| bytes.chunks_exact_mut(4)) {
                    if *word == LIE_ABOUT.to_ne_bytes() {
                        word.copy_from_slice(&1_000_000i32.to_ne_bytes());
                    }
                }
            }
            _ => {}
        }
        code
    }

    fn move_all(&self, flows: &mut [Flow<'_>], give_up: &dyn Fn() -> bool) -> i32 {
        let mut idle = 0;
        while flows.iter().any(|flow| flow.sent < flow.send.len() || flow.got < flow.recv.len()) {
            let mut moved = false;
            for flow in flows.iter_mut() {
                let Some(mut peer) = self.peers[flow.peer].as_ref() else { return 8 };
                if flow.sent < flow.send.len() {
                    match peer.write(&flow.send[flow.sent..]) {
                        Ok(0) => return 2,
                        Ok(more) => (flow.sent, moved) = (flow.sent + more, true),
                        Err(error) if error.kind() == IoKind::WouldBlock => {}
                        Err(_) => return 3,
                    }
                }
                if flow.got < flow.recv.len() {
                    match peer.read(&mut flow.recv[flow.got..]) {
                        Ok(0) => return 4,
                        Ok(more) => (flow.got, moved) = (flow.got + more, true),
                        Err(error) if error.kind() == IoKind::WouldBlock => {}
                        Err(_) => return 5,
                    }
                }
            }
            if moved {
                idle = 0;
                continue;
            }
            if give_up() {
                return 1;
            }
            idle += 1;
            if idle < 50 { thread::yield_now() } else { thread::sleep(Duration::from_micros(100)) }
        }
        0
    }

    fn patience(&self, timeout_ns: i64, abort: *const i32) -> impl Fn() -> bool {
        let until = Instant::now() + Duration::from_nanos(timeout_ns as u64);
        let deaf = self.deaf.load(Ordering::Relaxed) != 0;
        // SAFETY: the library keeps the word for the length of the callback; it is read as the atomic that it is.
        let abort = unsafe { AtomicI32::from_ptr(abort.cast_mut()) };
        move || abort.load(Ordering::Acquire) != 0 || (!deaf && Instant::now() >= until)
    }
}

/// What goes to a peer, and what comes from it.
struct Flow<'a> {
    peer: usize,
    send: &'a [u8],
    sent: usize,
    recv: &'a mut [u8],
    got: usize,
}

fn path(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank{rank}"))
}

/// # Safety
/// `ctx` is a live mesh; `send` is good for reading `bytes` bytes, and `recv` for writing as many for each rank; `abort` for reading.
unsafe extern "C" fn allgather(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    timeout_ns: i64,
    abort: *const i32,
) -> i32 {
    // SAFETY: `ctx` is the mesh that made this transport, and outlives the communicator; sizes are as the library says.
    let (mesh, send, recv) = unsafe {
        let mesh = &*ctx.cast::<Mesh>();
        let all = bytes * mesh.peers.len();
        (mesh, std::slice::from_raw_parts(send.cast(), bytes), std::slice::from_raw_parts_mut(recv.cast::<u8>(), all))
    };
    recv[mesh.rank * bytes..][..bytes].copy_from_slice(send);
    let flow = |(peer, recv)| Flow { peer, send, sent: 0, recv, got: 0 };
    let others = recv.chunks_exact_mut(bytes).enumerate().filter(|&(peer, _)| peer != mesh.rank);
    mesh.exchange(&mut others.map(flow).collect::<Vec<_>>(), mesh.patience(timeout_ns, abort))
}

/// # Safety
/// As [`allgather`], with `send_bytes` to read and `recv_bytes` to write; a side of 0 may point anywhere.
#[allow(clippy::too_many_arguments)] // the library's
unsafe extern "C" fn sendrecv(
    ctx: *mut c_void,
    send: *const c_void,
    send_bytes: usize,
    to: i32,
    recv: *mut c_void,
    recv_bytes: usize,
    from: i32,
    timeout_ns: i64,
    abort: *const i32,
) -> i32 {
    // SAFETY: as in `allgather`.
    let mesh = unsafe { &*ctx.cast::<Mesh>() };
    // SAFETY: sizes are as the library says; an empty side may have no address.
    let send = if send_bytes == 0 { &[] } else { unsafe { std::slice::from_raw_parts(send.cast(), send_bytes) } };
    let mut none = [];
    let recv = match recv_bytes {
        0 => &mut none[..],
        // SAFETY: as above.
        n => unsafe { std::slice::from_raw_parts_mut(recv.cast(), n) },
    };
    let mut flows = Vec::new();
    if !send.is_empty() {
        flows.push(Flow { peer: to as usize, send, sent: 0, recv: &mut [], got: 0 });
    }
    if !recv.is_empty() {
        flows.push(Flow { peer: from as usize, send: &[], sent: 0, recv, got: 0 });
    }
    let give_up = mesh.patience(timeout_ns, abort);
    if mesh.fault.load(Ordering::Relaxed) == STUCK {
        while !give_up() {
            thread::sleep(Duration::from_millis(1));
        }
        return 1;
    }
    mesh.exchange(&mut flows, give_up)
}

/// This rank's end of a communicator over its mesh.
pub fn connect(mesh: &Mesh, config: &CommConfig) -> Result<Communicator> {
    connect_as(mesh, mesh.rank, config)
}

/// The same under another number.
pub fn connect_as(mesh: &Mesh, rank: usize, config: &CommConfig) -> Result<Communicator> {
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let (transport, world) = (mesh.transport(false), mesh.world() as i32);
    // SAFETY: the mesh outlives the communicator.
    unsafe { Communicator::create_from_transport(&runtime, transport, world, rank as i32, Device::CPU, config) }
}
