//! A GPU: its context, one stream, and the kernels loaded so far.

use super::compile::{ElementKind, Source, cached};
use super::tensor_map::TensorMap;
use super::{CudaError, Result, Trying};
use cudarc::driver::result::memset_d8_async;
use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DevicePtrMut,
    DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
    impl Sealed for u32 {}
}

/// What lies in the memory of a GPU: numbers for which all bits mean something.
pub trait Number: DeviceRepr + Copy + sealed::Sealed {}

impl Number for half::bf16 {}
impl Number for half::f16 {}
impl Number for f32 {}
impl Number for u32 {}

/// A 16-bit float as the host knows it.
pub trait Element: Number + Send + Sync + 'static {
    /// Which of the two it is.
    const KIND: ElementKind;
}

impl Element for half::bf16 {
    const KIND: ElementKind = ElementKind::Bf16;
}

impl Element for half::f16 {
    const KIND: ElementKind = ElementKind::F16;
}

/// Bytes of shared memory that a block must be able to have: those of an A100.
const LEAST_SHARED: i32 = 163 << 10;

/// The address of device memory, as kernels take it; zero for nothing.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Address(pub(super) u64);

impl Address {
    pub(super) const NULL: Self = Self(0);

    /// The address of `T` number `n` from here.
    pub(super) fn skip<T>(self, n: usize) -> Self {
        Self(self.0 + (n * size_of::<T>()) as u64)
    }
}

/// Lets kernels take structs by value, which must be plain numbers in C's layout. They are as long as the kernels' own,
/// whose text says the same numbers of bytes: where one side alone grows, it does not compile.
macro_rules! arguments {
    ($($of:ident: $bytes:literal),+) => {$(
        // SAFETY: plain numbers, laid out as the kernels' struct.
        unsafe impl cudarc::driver::DeviceRepr for $of {}
        const _: () = assert!(size_of::<$of>() == $bytes);
    )+};
}
pub(super) use arguments;

/// The size of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    pub(super) grid: usize,
    pub(super) block: usize,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
}

type Loaded<K, V> = Mutex<HashMap<K, V>>;

/// One GPU. All work goes to one stream, in order.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    architecture: String,
    multiprocessors: usize,
    driver: i32,
    /// Whether fresh memory holds NaN.
    poisoned: bool,
    modules: Loaded<(&'static str, ElementKind), Arc<CudaModule>>,
    /// With the shared memory that each may use.
    functions: Loaded<(&'static str, ElementKind), (CudaFunction, usize)>,
    /// Memory between the kernels of layers, of each type, while no layer has it.
    #[cfg(feature = "linked")]
    pub(super) workspaces: Loaded<ElementKind, Option<Box<dyn std::any::Any + Send>>>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu")
            .field("architecture", &self.architecture)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens GPU number `ordinal`, with a stream of its own.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or it is older than Ampere.
    pub fn new(ordinal: usize) -> Result<Self> {
        // A program that is linked with the driver does not start without it.
        // SAFETY: only looks for the library.
        #[cfg(not(feature = "linked"))]
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let context = CudaContext::new(ordinal).trying(format!("opening GPU {ordinal}"))?;
        // SAFETY: there is one stream, so nothing needs to wait for another.
        unsafe { context.disable_event_tracking() };
        // The default stream cannot be captured.
        Self::on(context.new_stream().trying("making a stream")?)
    }

    /// Queues on a stream that is there already. Memory must have been taken with it, too.
    ///
    /// # Errors
    /// If the GPU is older than Ampere, or gives a block too little shared memory.
    pub fn on(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context().clone();
        let (major, minor) = context
            .compute_capability()
            .trying("asking for the GPU's kind")?;
        if major < 8 {
            let name = context.name().trying("asking for the GPU's name")?;
            return Err(CudaError::TooOld { name, major, minor });
        }
        let shared = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .trying("asking for the GPU's shared memory")?;
        if shared < LEAST_SHARED {
            let name = context.name().trying("asking for the GPU's name")?;
            return Err(CudaError::TooSmall { name, shared });
        }
        let suffix = if (major, minor) == (9, 0) { "a" } else { "" };
        let multiprocessors = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .trying("counting multiprocessors")? as usize;
        let mut driver = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut driver) }
            .result()
            .trying("asking for the driver")?;
        // Whatever comes of it: without, work takes longer.
        let _ = keep_memory(&context);
        Ok(Self {
            context,
            stream,
            architecture: format!("sm_{major}{minor}{suffix}"),
            multiprocessors,
            driver,
            poisoned: false,
            modules: Mutex::default(),
            functions: Mutex::default(),
            #[cfg(feature = "linked")]
            workspaces: Mutex::default(),
        })
    }

    /// Fills all memory that is taken from now on with NaN, so that a read before the first write shows.
    #[cfg(test)]
    pub(super) fn poisoned(self) -> Self {
        Self {
            poisoned: true,
            ..self
        }
    }

    /// The name of the card.
    ///
    /// # Errors
    /// If the driver does not answer.
    pub fn name(&self) -> Result<String> {
        self.context.name().trying("asking for the GPU's name")
    }

    /// The version of the driver, 13000 for CUDA 13.0.
    pub fn driver(&self) -> i32 {
        self.driver
    }

    /// Whether Hopper's own instructions can be used.
    pub fn is_hopper(&self) -> bool {
        self.architecture == "sm_90a"
    }

    /// What everything is queued on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// How many multiprocessors there are.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// If a kernel failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().trying("waiting for the GPU")
    }

    /// Memory for `n` numbers, whatever lies in it; for none, memory for one.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn alloc<T: Number>(&self, n: usize) -> Result<CudaSlice<T>> {
        let bytes = n.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| CudaError::Shape(format!("{n} numbers are too many")))?;
        let taking = || format!("taking {bytes} bytes of GPU memory");
        // SAFETY: any bits are numbers.
        let memory = unsafe { self.stream.alloc(n.max(1)) }.trying(taking())?;
        if self.poisoned {
            // SAFETY: the memory has as many bytes.
            unsafe {
                memset_d8_async(
                    self.address(&memory).0,
                    0xff,
                    bytes,
                    self.stream.cu_stream(),
                )
            }
            .trying("filling GPU memory")?;
        }
        Ok(memory)
    }

    /// Memory for `n` numbers, which `queue` queues the making of.
    #[cfg(feature = "linked")]
    pub(super) fn filled<T: Number>(
        &self,
        n: usize,
        queue: impl FnOnce(&mut CudaSlice<T>) -> Result<()>,
    ) -> Result<CudaSlice<T>> {
        let mut memory = self.alloc(n)?;
        queue(&mut memory)?;
        // Noted once more: a stream that reads it waits for what was queued until here.
        self.address_mut(&mut memory);
        Ok(memory)
    }

    /// A copy of `values` on the GPU.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn upload<T: Number>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        if values.is_empty() {
            return self.alloc(0);
        }
        self.stream
            .clone_htod(values)
            .trying(format!("copying {} numbers to the GPU", values.len()))
    }

    /// A copy of `values` on the host, after all that was queued.
    ///
    /// # Errors
    /// If a kernel failed.
    pub fn download<T: Number>(&self, values: &CudaSlice<T>) -> Result<Vec<T>> {
        let values = self.stream.clone_dtoh(values);
        let values = values.trying("copying from the GPU")?;
        self.synchronize()?;
        Ok(values)
    }

    /// Where memory, or a part of some, begins.
    ///
    /// # Panics
    /// If it was taken with another stream, which would not wait for this one.
    pub(super) fn address<T>(&self, values: &impl DevicePtr<T>) -> Address {
        self.own(values.stream());
        Address(values.device_ptr(&self.stream).0)
    }

    /// # Panics
    /// As [`Gpu::address`].
    pub(super) fn address_mut<T>(&self, values: &mut impl DevicePtrMut<T>) -> Address {
        self.own(values.stream());
        Address(values.device_ptr_mut(&self.stream).0)
    }

    fn own(&self, stream: &Arc<CudaStream>) {
        assert!(
            Arc::ptr_eq(stream, &self.stream),
            "this memory belongs to another `Gpu`; use it with the one that it was taken from"
        );
    }

    /// A kernel, compiled and loaded at first use, that may use `shared` bytes of shared memory.
    pub(super) fn kernel(
        &self,
        source: &Source,
        element: ElementKind,
        name: &'static str,
        shared: usize,
    ) -> Result<CudaFunction> {
        self.context
            .bind_to_thread()
            .trying("using the GPU from this thread")?;
        let mut functions = lock(&self.functions);
        let loaded = match functions.entry((name, element)) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(place) => {
                let module = self.module(source, element)?;
                let function = module.load_function(name);
                place.insert((function.trying(format!("loading `{name}`"))?, 0))
            }
        };
        if shared > loaded.1 {
            loaded
                .0
                .set_attribute(MAX_SHARED, shared as i32)
                .trying(format!("giving `{name}` {shared} bytes of shared memory"))?;
            loaded.1 = shared;
        }
        Ok(loaded.0.clone())
    }

    fn module(&self, source: &Source, element: ElementKind) -> Result<Arc<CudaModule>> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(&(source.name, element)) {
            return Ok(module.clone());
        }
        let image = cached(source, element, &self.architecture, self.driver)?;
        let loading = format!("loading the kernels of `{}`", source.name);
        let module = self
            .context
            .load_module(Ptx::from_binary(image))
            .trying(loading)?;
        modules.insert((source.name, element), module.clone());
        Ok(module)
    }

    /// How many blocks of a kernel the whole GPU holds at once.
    pub(super) fn resident(
        &self,
        function: &CudaFunction,
        block: usize,
        shared: usize,
    ) -> Result<usize> {
        let each = function
            .occupancy_max_active_blocks_per_multiprocessor(block as u32, shared, None)
            .trying("asking how many blocks fit")?;
        Ok(each as usize * self.multiprocessors)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// `arguments` must be what the kernel takes, with addresses of enough memory that outlives it.
    pub(super) unsafe fn launch<A: DeviceRepr>(
        &self,
        function: &CudaFunction,
        launch: Launch,
        arguments: &A,
        maps: &[TensorMap],
    ) -> Result<()> {
        let mut builder = self.stream.launch_builder(function);
        builder.arg(arguments);
        for map in maps {
            builder.arg(map);
        }
        let size = LaunchConfig {
            grid_dim: (launch.grid as u32, 1, 1),
            block_dim: (launch.block as u32, 1, 1),
            shared_mem_bytes: launch.shared as u32,
        };
        // SAFETY: the caller's promise.
        unsafe { builder.launch(size) }.trying("queueing a kernel")?;
        Ok(())
    }
}

/// Lets the driver keep memory that was given back. Else it gives all of it away whenever the host waits for the GPU, and
/// maps it anew.
fn keep_memory(context: &CudaContext) -> Result<()> {
    use sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
    let has_pools = context
        .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)
        .trying("asking for pools of memory")?;
    if has_pools == 0 {
        return Ok(());
    }
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the device is one, the first call writes a pool, the second reads a number of 64 bits.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device())
            .result()
            .trying("asking for the pool of memory")?;
        sys::cuMemPoolSetAttribute(pool, THRESHOLD, (&raw mut all).cast())
            .result()
            .trying("keeping memory")
    }
}

/// A lock that a panic elsewhere does not spoil: the maps are only added to.
pub(super) fn lock<K, V>(map: &Loaded<K, V>) -> std::sync::MutexGuard<'_, HashMap<K, V>> {
    map.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
