//! What this machine's GPUs can be used for, and why not: what `info` shows and what `verify` tries.

use treeattn::attention::{AttentionDesc, Dtype};
use treeattn::device::{DeviceKind, cuda_support};
use treeattn::runtime::{CommConfig, Communicator, Device, Plan, Runtime, nccl_library};

use crate::bench::measure_peers;
use crate::outcome::{Outcome, print};

/// Bytes of the exchange that is timed between two GPUs: a partial of 32 heads x 128.
const EXCHANGED: usize = 32 * 129 * 4;

/// A line each for the driver, the kernels in this build, every GPU and NCCL. Runs nothing on a GPU.
pub fn describe(runtime: &Runtime) -> Outcome<Vec<String>> {
    let support = cuda_support();
    let line = |what: &str, found: treeattn::Result<String>| match found {
        Ok(found) => format!("{what}: {found}"),
        Err(error) => error.message().to_string(),
    };
    let mut lines = vec![line("CUDA driver", support.driver), line("kernels for GPUs", support.kernels)];
    for ordinal in 0..runtime.device_count(DeviceKind::Cuda)? {
        let info = runtime.device_info(Device { kind: DeviceKind::Cuda, ordinal })?;
        let gib = info.memory as f64 / f64::from(1 << 30);
        let (device, name, units, isa) = (info.device, info.name, info.units, info.isa);
        lines.push(format!("{device}: {name}, {gib:.0} GiB, {units} multiprocessors, {isa}"));
    }
    lines.push(line("NCCL", nccl_library(None)));
    Ok(lines)
}

/// Tries what a fused step on `devices` needs: kernels that load on each, and between every two of them writes that arrive both
/// ways. A line each. Whether all of it is there.
pub fn examine(runtime: &Runtime, devices: &[Device]) -> Outcome<bool> {
    for line in describe(runtime)? {
        print(&format!("      {line}\n"))?;
    }
    let mut distinct: Vec<Device> = Vec::new();
    for &device in devices {
        if !distinct.contains(&device) {
            distinct.push(device);
        }
    }
    let mut all = true;
    let mut tell = |what: String, found: Outcome<String>| -> Outcome<bool> {
        let (word, rest) = match found {
            Ok(rest) => ("ok", rest),
            Err(error) => ("FAIL", error.to_string()),
        };
        all &= word == "ok";
        print(&format!("{word:<5} {what}: {rest}\n"))?;
        Ok(word == "ok")
    };
    for &device in &distinct {
        tell(device.to_string(), load(runtime, device))?;
    }
    for (n, &a) in distinct.iter().enumerate() {
        for &b in &distinct[n + 1..] {
            let pair = format!("{a} and {b}");
            let connected = Communicator::create_local(runtime, &[a, b], &CommConfig::default());
            let connected = connected.map(|_| "writes arrive both ways".to_string());
            if tell(pair.clone(), connected.map_err(Into::into))? {
                let measured = measure_peers(runtime, [a, b], &[EXCHANGED]).map(|peers| {
                    let plain = peers.exchanges.first().map_or(0.0, |plain| 1e6 * plain.seconds);
                    format!(
                        "a flag one way in {:.2} us, copies at {:.0} GB/s, {EXCHANGED} bytes exchanged in {plain:.2} us",
                        1e6 * peers.flag,
                        1e-9 * peers.copy
                    )
                });
                tell(pair, measured)?;
            }
        }
    }
    Ok(all)
}

/// Whether kernels load on a GPU.
fn load(runtime: &Runtime, device: Device) -> Outcome<String> {
    let mut desc = AttentionDesc::new(32, 8, 128, 1024);
    (desc.q_dtype, desc.k_dtype, desc.v_dtype, desc.out_dtype) = (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16, Dtype::Bf16);
    let comms = Communicator::create_local(runtime, &[device], &CommConfig::default())?;
    for comm in &comms {
        Plan::create(comm, &desc)?;
    }
    Ok("kernels load".into())
}
