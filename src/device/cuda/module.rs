//! Kernels: the image that the library carries, its modules on a device, and their launches.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;

use cudarc::driver::sys;

use super::allocations::FREE_TIMEOUT;
use super::context::{CudaDevice, Entered};
use super::driver::{Driver, Status};
use super::resource::{LoadedModule, Resource};
use super::stream::CudaStream;
use crate::error::{Error, ErrorKind, Result};

/// The modules that build.rs compiled, and what it says of them.
mod image {
    include!(concat!(env!("OUT_DIR"), "/image.rs"));
}

/// Statuses for an image that has no code for the GPU, or that a newer toolkit made.
const UNFIT: [u32; 6] = [200, 209, 218, 221, 222, 223];

/// `CUDA_ERROR_NOT_FOUND`: the module does not have the symbol.
const NOT_FOUND: Status = 500;

/// The kernels of one source on a device, loaded once however many plans use them. Any thread may use it.
struct Module {
    device: Arc<CudaDevice>,
    handle: sys::CUmodule,
}

// SAFETY: the handle is a number to the driver, which takes it from any thread; the device is Send and Sync.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// The module of a source, which is loaded unless it is already. Blocks; `Capturing` during a capture.
    fn load(device: &Arc<CudaDevice>, name: &'static str, bytes: &'static [u8]) -> Result<Module> {
        // Held while loading: another plan of the device gets this module instead of a second one.
        let mut modules = device.modules.lock();
        if let Some(known) = modules.iter_mut().find(|known| known.name == name) {
            known.users += 1;
            return Ok(Module { device: Arc::clone(device), handle: known.handle });
        }
        let changing = device.enter_to_change()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current. The image is a whole fatbin that build.rs aligned, and static; the call writes one
        // handle to a local.
        let status = unsafe { (device.driver.module_load_data)(&mut handle, bytes.as_ptr().cast()) };
        if UNFIT.contains(&status) {
            return Err(unfit(device, status));
        }
        device.check(status, "cuModuleLoadData")?;
        drop(changing);
        modules.push(LoadedModule { name, handle, users: 1 });
        Ok(Module { device: Arc::clone(device), handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let mut modules = self.device.modules.lock();
        let Some(at) = modules.iter().position(|known| known.handle == self.handle) else { return };
        modules[at].users -= 1;
        if modules[at].users == 0 {
            modules.swap_remove(at);
            drop(modules);
            self.device.free(vec![Resource::Module(self.handle)], FREE_TIMEOUT);
        }
    }
}

/// A kernel that is resident on its device. Any thread may launch it.
pub(crate) struct Kernel {
    module: Module,
    function: sys::CUfunction,
    /// Threads of a block.
    threads: u32,
    /// Dynamic shared memory of a block, bytes.
    shared: u32,
    /// Whether it may start before its predecessor ends: the GPU and the compiled code must both allow it.
    dependent: bool,
}

// SAFETY: the handle is a number to the driver, which takes it from any thread; it is valid as long as its module, which is
// a field, Send and Sync.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// The image that the library carries, on a device.
pub(crate) struct Image {
    device: Arc<CudaDevice>,
}

/// What the kernels that this build carries were compiled for and with. `Unavailable` as [`Image::new`].
pub(crate) fn describe_image() -> Result<String> {
    check_image()?;
    let (major, minor) = image::TOOLKIT;
    Ok(format!("sm_{} by CUDA {major}.{minor}", image::ARCHS.join(", sm_").replace("sm_ptx", "PTX of ")))
}

/// `Unavailable`, saying what to do, where this build carries no kernels.
fn check_image() -> Result<()> {
    if !image::MODULES.is_empty() {
        return Ok(());
    }
    let message = format!(
        "kernels: found none in this build of the library ({}), wanted a build made where nvcc is found: set \
         TREEATTN_NVCC, or install a CUDA toolkit or pip's nvidia-cuda-nvcc; TREEATTN_CUDA=required makes sure",
        image::WHY_EMPTY
    );
    Err(Error::new(ErrorKind::Unavailable, message))
}

impl Image {
    /// `Unavailable`, saying what to do, where this build carries no kernels.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Image> {
        check_image()?;
        Ok(Image { device: Arc::clone(device) })
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Finds a symbol, and the module that has it. `find` asks one module for it and gives the driver's status. A kernel lies
    /// in the source whose name its own begins with, if there is one; an image that was compiled elsewhere may be one file of
    /// any name.
    fn find(
        &self,
        symbol: &str,
        mut find: impl FnMut(&Driver, sys::CUmodule, *const c_char) -> Status,
    ) -> Result<Module> {
        let name = CString::new(symbol).map_err(|_| Error::new(ErrorKind::Internal, "a symbol's name holds a zero"))?;
        let bare = symbol.strip_prefix("treeattn_").unwrap_or(symbol);
        let (likely, other): (Vec<_>, Vec<_>) = image::MODULES.iter().partition(|(source, _)| bare.starts_with(source));
        for &&(source, bytes) in likely.iter().chain(&other) {
            let module = Module::load(&self.device, source, bytes)?;
            let entered = self.device.enter_to_change()?;
            match find(self.device.driver, module.handle, name.as_ptr()) {
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
        // SAFETY: `find` makes the context current and passes a live module and a string with its zero; the call writes one
        // handle to a local.
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
        // SAFETY: `find` makes the context current and passes a live module and a string with its zero; the call writes an
        // address and a size to locals.
        let _module = self.find(symbol, |driver, module, name| unsafe {
            (driver.module_get_global)(&mut address, &mut bytes, module, name)
        })?;
        if bytes != to.len() {
            let message = format!("{symbol}: found {bytes} bytes in the image, wanted {}", to.len());
            return Err(Error::new(ErrorKind::Internal, message));
        }
        // SAFETY: the address is that of a variable of `_module`, which stays loaded meanwhile; its size was just compared; it
        // is constant, so that no work writes it.
        unsafe { self.device.download(address, to) }
    }

    /// A kernel by its name, made resident, for blocks of `threads` threads and `shared` bytes of dynamic shared
    /// memory. Blocks; `Capturing` during a capture.
    pub fn kernel(&self, name: &str, threads: u32, shared: u32) -> Result<Kernel> {
        use sys::CUfunction_attribute as Attribute;
        let device = &self.device;
        let mut function = std::ptr::null_mut();
        // SAFETY: `find` makes the context current and passes a live module and a string with its zero; the call writes one
        // handle to a local.
        let module = self
            .find(name, |driver, module, name| unsafe { (driver.module_get_function)(&mut function, module, name) })?;
        let changing = device.enter_to_change()?;
        let driver = device.driver;
        let (mut blocks, mut version) = (0, 0);
        // The driver chooses how much of L1 is shared memory: loads under way lie in the rest of it.
        // Asking for an attribute makes the kernel resident, whatever the loading mode.
        // SAFETY: the context is current, `function` is one of `module`, which is held; the calls write ints to locals.
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
        // Code that was compiled for GPUs without such launches does not wait for its predecessor, on whatever GPU it runs.
        let dependent = device.dependent_launches() && version >= 90;
        Ok(Kernel { module, function, threads, shared, dependent })
    }
}

#[cold]
fn unfit(device: &CudaDevice, status: u32) -> Error {
    let (major, minor) = device.compute_capability;
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
        &self.module.device
    }

    /// Enqueues `grid` blocks with `parameters` by value. Allocates nothing, and may be captured. The kernel may start
    /// before its predecessor ends; it waits where it must.
    ///
    /// # Safety
    /// `P` has the layout of the kernel's only parameter. The memory that it points to stays valid until the kernel is done,
    /// and nobody else uses it in a way that races with the kernel.
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
        // SAFETY: `_entered` shows that a context is current; the function's module is held; config, attribute and parameters
        // are locals or borrowed, and the driver copies them before it returns. What the parameters point to is the
        // caller's promise.
        let status = unsafe {
            (device.driver.launch_kernel_ex)(&config, self.function, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        if status == 0 { Ok(()) } else { device.check(status, "cuLaunchKernelEx") }
    }
}

impl CudaDevice {
    /// Whether a launch may depend on its predecessor programmatically. The GPU must allow it, and the driver also in
    /// captures, as those before 12.3 do not.
    fn dependent_launches(&self) -> bool {
        self.compute_capability.0 >= 9 && self.driver.version() >= (12, 3)
    }
}
