//! A rank's memory on a GPU: every buffer of a [`Rank`] copied to the device, and the same arguments over the copies.

use std::ffi::c_void;

use treeattn::Result;
use treeattn::attention::{AttentionDesc, DecodeArgs};
use treeattn::runtime::{Buffer, CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};

use crate::support::case::Case;
use crate::support::memory::Memory;
use crate::support::rank::Rank;

pub const GPU: Device = Device { kind: DeviceKind::Cuda, ordinal: 0 };
/// Buffers begin at multiples of this, plus what their host address has beyond one.
const ALIGN: usize = 256;

/// What it takes to run steps on a GPU.
pub struct Gpu {
    pub runtime: Runtime,
    pub device: Device,
    pub stream: Stream,
}

impl Gpu {
    /// The first.
    pub fn new() -> Gpu {
        Gpu::numbered(&Runtime::new(RuntimeConfig::default()).unwrap(), GPU.ordinal)
    }

    pub fn numbered(runtime: &Runtime, ordinal: i32) -> Gpu {
        let device = Device { ordinal, ..GPU };
        let stream = Stream::new(runtime, device).unwrap();
        Gpu { runtime: runtime.clone(), device, stream }
    }

    /// Communicators of `world` ranks, all on this GPU.
    pub fn ranks(&self, world: usize) -> Vec<Communicator> {
        Communicator::create_local(&self.runtime, &vec![GPU; world], &CommConfig::default()).unwrap()
    }

    /// A plan of one rank, and its communicator.
    pub fn plan(&self, desc: &AttentionDesc) -> (Communicator, Plan) {
        let comm = self.ranks(1).remove(0);
        let plan = Plan::create(&comm, desc).unwrap();
        (comm, plan)
    }
}

/// A rank's memory on the device.
pub struct Mirror {
    pub args: DecodeArgs,
    buffer: Buffer,
    /// Host address, length, and offset in `buffer`.
    copies: Vec<(usize, usize, usize)>,
}

impl Mirror {
    /// Copies everything that `rank` has, its outputs, too. What lies between is NaN.
    pub fn new(gpu: &Gpu, rank: &Rank) -> Mirror {
        let (mut copies, mut end) = (Vec::new(), 0);
        for memory in memories(rank) {
            let host = memory.ptr() as usize;
            let offset = usize::next_multiple_of(end, ALIGN) + host % ALIGN;
            copies.push((host, memory.len(), offset));
            end = offset + memory.len().max(1);
        }
        let buffer = Buffer::alloc(&gpu.runtime, gpu.device, end + ALIGN).unwrap();
        assert_eq!(buffer.data() as usize % ALIGN, 0);
        let mut staged = vec![0xffu8; buffer.bytes()];
        for (memory, &(_, len, offset)) in memories(rank).zip(&copies) {
            staged[offset..offset + len].copy_from_slice(memory.bytes());
        }
        buffer.upload(0, &staged).unwrap();
        let mut mirror = Mirror { args: rank.args, buffer, copies };
        let ints = |host: *const i32| mirror.at(host.cast()).cast::<i32>().cast_const();
        let a = &rank.args;
        let mut args = DecodeArgs {
            query_start: ints(a.query_start),
            kv_length: ints(a.kv_length),
            global_length: ints(a.global_length),
            kv_start: ints(a.kv_start),
            kv_position: ints(a.kv_position),
            query_position: ints(a.query_position),
            block_table: ints(a.block_table),
            page_indptr: ints(a.page_indptr),
            page_indices: ints(a.page_indices),
            last_page_len: ints(a.last_page_len),
            ..*a
        };
        for (to, from) in [
            (&mut args.q, a.q),
            (&mut args.k, a.k),
            (&mut args.v, a.v),
            (&mut args.k_scale, a.k_scale),
            (&mut args.v_scale, a.v_scale),
            (&mut args.out, a.out),
            (&mut args.lse, a.lse),
            (&mut args.sinks, a.sinks),
            (&mut args.alibi_slopes, a.alibi_slopes),
            (&mut args.mask, a.mask),
            (&mut args.mask_factor, a.mask_factor),
        ] {
            to.data = mirror.at(from.data);
        }
        mirror.args = args;
        mirror
    }

    /// Where a host address of the rank lies on the device.
    fn at(&self, host: *const c_void) -> *mut c_void {
        if host.is_null() {
            return std::ptr::null_mut();
        }
        let host = host as usize;
        let copy = self.copies.iter().find(|&&(begin, len, _)| (begin..=begin + len).contains(&host));
        let &(begin, _, offset) = copy.expect("an address of the rank");
        self.buffer.data().wrapping_byte_add(offset + host - begin)
    }

    /// Where the copies begin, on the device.
    pub fn address(&self) -> u64 {
        self.buffer.data() as u64
    }

    /// Their bytes, what lies between included: a multiple of 16.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes() / 16 * 16
    }

    /// Fills them all.
    pub fn fill(&self, byte: u8) {
        self.buffer.upload(0, &vec![byte; self.buffer.bytes()]).unwrap();
    }

    /// Where the outputs lie on the device, what lies between them included: the address, a multiple of 4, and the bytes.
    pub fn outputs(&self) -> (u64, usize) {
        let begin = self.args.out.data as usize;
        (begin as u64, self.args.lse.data as usize + self.args.lse.bytes as usize - begin)
    }

    /// Copies one of the rank's buffers anew.
    pub fn update(&self, memory: &Memory) {
        if memory.len() > 0 {
            let at = self.at(memory.ptr()) as usize - self.buffer.data() as usize;
            self.buffer.upload(at, memory.bytes()).unwrap();
        }
    }

    /// Copies all of the rank's int32 inputs and outputs anew.
    pub fn update_all(&self, rank: &Rank) {
        memories(rank).for_each(|memory| self.update(memory));
    }

    /// Copies the outputs back into the rank's memory.
    pub fn fetch(&self, rank: &mut Rank) {
        for memory in [&mut rank.out, &mut rank.lse] {
            if memory.len() > 0 {
                let at = self.at(memory.ptr()) as usize - self.buffer.data() as usize;
                self.buffer.download(at, memory.bytes_mut()).unwrap();
            }
        }
    }

    /// One step, waited for, with its outputs brought back.
    pub fn decode(&self, gpu: &Gpu, plan: &Plan, rank: &mut Rank) -> Result<()> {
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plan.decode(&self.args, Some(&gpu.stream))? };
        gpu.stream.synchronize()?;
        self.fetch(rank);
        Ok(())
    }
}

/// Every buffer of a rank.
fn memories(rank: &Rank) -> impl Iterator<Item = &Memory> {
    [&rank.q, &rank.k].into_iter().chain(&rank.v).chain([
        &rank.out,
        &rank.lse,
        &rank.query_start,
        &rank.query_position,
        &rank.kv_length,
        &rank.global_length,
        &rank.kv_start,
        &rank.kv_position,
        &rank.block_table,
        &rank.page_indptr,
        &rank.page_indices,
        &rank.last_page_len,
        &rank.k_scale,
        &rank.v_scale,
        &rank.sinks,
        &rank.slopes,
        &rank.mask,
        &rank.factors,
    ])
}

/// A packed case of one rank: memory, its mirror, and a plan for it.
pub struct Ready {
    pub gpu: Gpu,
    pub case: Case,
    pub rank: Rank,
    pub mirror: Mirror,
    pub comm: Communicator,
    pub plan: Plan,
}

impl Ready {
    pub fn new(case: Case) -> Ready {
        let gpu = Gpu::new();
        let rank = Rank::new(&case, 0);
        let mirror = Mirror::new(&gpu, &rank);
        let (comm, plan) = gpu.plan(&case.desc);
        Ready { gpu, case, rank, mirror, comm, plan }
    }

    /// A step; gives all bits that it wrote.
    pub fn bits(&mut self) -> Vec<u32> {
        self.mirror.decode(&self.gpu, &self.plan, &mut self.rank).unwrap();
        self.rank.bits(&self.case)
    }
}
