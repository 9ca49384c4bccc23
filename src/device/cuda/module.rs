//! Kernels: the image that the library carries, its modules on a device, and their launches.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Weak};

use cudarc::driver::sys;

use super::context::{CudaDevice, Entered};
use super::driver::{Driver, Status};
use super::holdings::{Holdings, PATIENCE};
use super::stream::CudaStream;
use crate::error::{Error, ErrorKind, Result};

/// What build.rs compiled.
mod image {
    include!(concat!(env!("OUT_DIR"), "/image.rs"));
}

/// What the driver says of an image that has nothing for the GPU, or that was made by a newer toolkit.
const UNFIT: [u32; 6] = [200, 209, 218, 221, 222, 223];

/// What the driver says of a symbol that a module does not have.
const NOT_FOUND: Status = 500;

/// One source's kernels on a device, loaded once however many plans use them.
pub(crate) struct Module {
    holdings: Holdings,
    module: sys::CUmodule,
}

// SAFETY: the driver takes a module from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel that is resident on its device.
pub(crate) struct Kernel {
    module: Arc<Module>,
    function: sys::CUfunction,
    /// Threads of a block.
    threads: u32,
    /// Dynamic shared memory of a block, bytes.
    shared: u32,
    /// Whether it may start before its predecessor ends: on the GPU, and as it was compiled.
    dependent: bool,
}

// SAFETY: as for the module.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// A module of the image, loaded if it is not yet. Blocks; `Capturing` during a capture.
    fn load(device: &Arc<CudaDevice>, name: &'static str, bytes: &'static [u8]) -> Result<Arc<Module>> {
        let mut modules = device.modules.lock();
        modules.retain(|(_, module)| module.strong_count() > 0);
        if let Some(known) = modules.iter().find(|known| known.0 == name).and_then(|(_, known)| Weak::upgrade(known)) {
            return Ok(known);
        }
        let changing = device.enter_to_change()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a fatbin, aligned and alive as long as the process.
        let status = unsafe { (device.driver.module_load_data)(&mut module, bytes.as_ptr().cast()) };
        if UNFIT.contains(&status) {
            return Err(unfit(device, status));
        }
        device.check(status, "cuModuleLoadData")?;
        drop(changing);
        let mut holdings = Holdings::new(device, PATIENCE);
        holdings.module(module);
        let module = Arc::new(Module { holdings, module });
        modules.push((name, Arc::downgrade(&module)));
        Ok(module)
    }
}

/// The image that the library carries, on a device.
pub(crate) struct Image {
    device: Arc<CudaDevice>,
}

impl Image {
    /// `Unavailable`, saying what to do, where this build carries no kernels.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Image> {
        if !image::MODULES.is_empty() {
            return Ok(Image { device: Arc::clone(device) });
        }
        let message = format!(
            "kernels: found none in this build of the library ({}), wanted a build made where nvcc is found: set \
             TREEATTN_NVCC, or install a CUDA toolkit or pip's nvidia-cuda-nvcc; TREEATTN_CUDA=required makes sure",
            image::WHY_EMPTY
        );
        Err(Error::new(ErrorKind::Unavailable, message))
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Finds a symbol: `find` asks a module for it and gives 0, or what the driver says. A kernel lies in a source that
    /// its name begins with, where there is one; an image that was compiled elsewhere may be one file of any name.
    fn find(
        &self,
        symbol: &str,
        mut find: impl FnMut(&Driver, sys::CUmodule, *const c_char) -> Status,
    ) -> Result<Arc<Module>> {
        let name = CString::new(symbol).map_err(|_| Error::new(ErrorKind::Internal, "a symbol's name holds a zero"))?;
        let bare = symbol.strip_prefix("treeattn_").unwrap_or(symbol);
        let (likely, other): (Vec<_>, Vec<_>) = image::MODULES.iter().partition(|(source, _)| bare.starts_with(source));
        for &&(source, bytes) in likely.iter().chain(&other) {
            let module = Module::load(&self.device, source, bytes)?;
            let entered = self.device.enter_to_change()?;
            match find(self.device.driver, module.module, name.as_ptr()) {
                NOT_FOUND => drop(entered),
                status => {
                    self.device.check(status, &format!("finding {symbol}"))?;
                    drop(entered);
                    return Ok(module);
                }
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("kernels: found no {symbol} in this build's image, wanted one")))
    }

    /// Whether the image holds a kernel of this name. Blocks; `Capturing` during a capture.
    pub fn has(&self, name: &str) -> Result<bool> {
        let mut function = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let found = self
            .find(name, |driver, module, name| unsafe { (driver.module_get_function)(&mut function, module, name) });
        match found {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unavailable && error.message().starts_with("kernels:") => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The bytes of a constant of the image. Blocks; `Capturing` during a capture.
    pub fn constant(&self, symbol: &str, to: &mut [u8]) -> Result<()> {
        let (mut address, mut bytes) = (0, 0);
        // SAFETY: writes one address and one size.
        let _module = self.find(symbol, |driver, module, name| unsafe {
            (driver.module_get_global)(&mut address, &mut bytes, module, name)
        })?;
        if bytes != to.len() {
            let message = format!("{symbol}: found {bytes} bytes in the image, wanted {}", to.len());
            return Err(Error::new(ErrorKind::Internal, message));
        }
        // SAFETY: a variable of a module that is held here, as long as was just seen.
        unsafe { self.device.download(address, to) }
    }

    /// A kernel by its name, made resident, for blocks of `threads` threads and `shared` bytes of dynamic shared
    /// memory. Blocks; `Capturing` during a capture.
    pub fn kernel(&self, name: &str, threads: u32, shared: u32) -> Result<Kernel> {
        use sys::CUfunction_attribute as Attribute;
        let device = &self.device;
        let mut function = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let module = self
            .find(name, |driver, module, name| unsafe { (driver.module_get_function)(&mut function, module, name) })?;
        let changing = device.enter_to_change()?;
        let driver = device.driver;
        let (mut blocks, mut version) = (0, 0);
        // How much of L1 is shared memory is left to the driver: loads under way lie in the rest of it.
        // SAFETY: sets and reads attributes of the function; asking makes it resident, whatever the loading mode.
        unsafe {
            let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            if shared > 48 << 10 {
                let status = (driver.func_set_attribute)(function, most, shared as i32);
                device.check(status, &format!("cuFuncSetAttribute({name}, {shared} bytes of shared memory)"))?;
            }
            let made_for = Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
            device.check((driver.func_get_attribute)(&mut version, made_for, function), "cuFuncGetAttribute")?;
            let status = (driver.occupancy)(&mut blocks, function, threads as i32, shared as usize);
            device.check(status, "cuOccupancyMaxActiveBlocksPerMultiprocessor")?;
        }
        drop(changing);
        if blocks < 1 {
            let message =
                format!("{name}: a block of {threads} threads and {shared} bytes does not fit {}", device.device());
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        // What was compiled for GPUs without such launches does not wait for what it depends on, wherever it runs.
        let dependent = device.dependent_launches() && version >= 90;
        Ok(Kernel { module, function, threads, shared, dependent })
    }
}

#[cold]
fn unfit(device: &CudaDevice, status: u32) -> Error {
    let (major, minor) = device.capability;
    let (has_major, has_minor) = device.driver.version();
    let (made_major, made_minor) = image::TOOLKIT;
    let needs = match made_major {
        0 => "a driver of the toolkit that made them, or later".to_string(),
        _ => format!("a driver for CUDA {made_major}.{made_minor} or later"),
    };
    let message = format!(
        "device: found {}, sm_{major}{minor} with a driver for CUDA {has_major}.{has_minor}, wanted one of {}, which this \
         build's kernels are for, and {needs} (cuModuleLoadData gave {}); or build with TREEATTN_CUDA_ARCHS={major}{minor}",
        device.device(),
        image::ARCHS.join(", "),
        device.driver.describe(status)
    );
    Error::new(ErrorKind::Unavailable, message)
}

impl Kernel {
    /// The kernel's device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        self.module.holdings.device()
    }

    /// Enqueues `grid` blocks with `parameters` by value. Allocates nothing, and may be captured. The kernel may start
    /// before its predecessor ends, and itself waits where it must.
    ///
    /// # Safety
    /// `P` is what the kernel takes, and the memory it points to stays valid until the kernel is done.
    pub unsafe fn launch<P>(
        &self,
        _entered: &Entered<'_>,
        stream: &CudaStream,
        grid: u32,
        parameters: &P,
    ) -> Result<()> {
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream.handle(),
            attrs: &mut attribute,
            numAttrs: u32::from(self.dependent),
        };
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let device = self.device();
        // SAFETY: the context is current; the driver copies the parameters before it returns; the rest is the caller's.
        let status = unsafe {
            (device.driver.launch_kernel_ex)(&config, self.function, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        if status == 0 { Ok(()) } else { device.check(status, "cuLaunchKernelEx") }
    }
}

impl CudaDevice {
    /// Whether launches may depend programmatically: on the GPU, and in captures, which drivers before 12.3 refuse.
    fn dependent_launches(&self) -> bool {
        self.capability.0 >= 9 && self.driver.version() >= (12, 3)
    }
}
