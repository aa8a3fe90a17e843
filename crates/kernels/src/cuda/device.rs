//! A GPU: its context, one stream, and the kernels loaded so far.

use super::compile::{ElementKind, Source, cached};
use super::{CudaError, Result, Trying};
use cudarc::driver::result::memset_d8_async;
use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr,
    DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::marker::PhantomData;
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
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu")
            .field("architecture", &self.architecture)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens GPU number `ordinal`.
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
        // The default stream cannot be captured.
        let stream = context.new_stream().trying("making a stream")?;
        Ok(Self {
            context,
            stream,
            architecture: format!("sm_{major}{minor}{suffix}"),
            multiprocessors,
            driver,
            poisoned: false,
            modules: Mutex::default(),
            functions: Mutex::default(),
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

    /// Records what `work` queues, to be queued again with one call. The kernels must have run before, and
    /// nothing may be taken, copied to the GPU or from it meanwhile.
    ///
    /// # Errors
    /// If `work` fails or queues what cannot be recorded.
    pub fn capture<'a>(&self, work: impl FnOnce() -> Result<()> + 'a) -> Result<Graph<'a>> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THREAD_LOCAL;
        self.stream
            .begin_capture(THREAD_LOCAL)
            .trying("beginning to record a graph")?;
        let done = work();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).trying("recording a graph");
        done?;
        let graph = graph?.ok_or_else(|| CudaError::Shape("nothing was recorded".into()))?;
        Ok(Graph {
            graph,
            memory: PhantomData,
        })
    }

    /// # Panics
    /// If the memory was taken from another [`Gpu`]: its stream would not wait for this one's.
    pub(super) fn address<T>(&self, values: &CudaSlice<T>) -> Address {
        self.own(values);
        Address(values.device_ptr(&self.stream).0)
    }

    /// # Panics
    /// As [`Gpu::address`].
    pub(super) fn address_mut<T>(&self, values: &mut CudaSlice<T>) -> Address {
        self.own(values);
        Address(values.device_ptr_mut(&self.stream).0)
    }

    fn own<T>(&self, values: &CudaSlice<T>) {
        assert!(
            Arc::ptr_eq(values.stream(), &self.stream),
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

/// Recorded work. It holds on to the memory that the recorded closure borrowed.
pub struct Graph<'a> {
    graph: CudaGraph,
    memory: PhantomData<&'a mut ()>,
}

impl std::fmt::Debug for Graph<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Graph<'_> {
    /// Queues the work.
    ///
    /// # Safety
    /// All memory that the recorded work uses must still be there, for what it was there then, and
    /// nothing else may have been queued while it was recorded. What was only borrowed is held on to.
    ///
    /// # Errors
    /// If the driver refuses.
    pub unsafe fn launch(&self) -> Result<()> {
        self.graph.launch().trying("queueing a graph")
    }
}

/// A lock that a panic elsewhere does not spoil: the maps are only added to.
fn lock<K, V>(map: &Loaded<K, V>) -> std::sync::MutexGuard<'_, HashMap<K, V>> {
    map.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How the copy engine of Hopper reads a matrix.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct TensorMap(sys::CUtensorMap);

// SAFETY: plain bytes that a kernel takes by value.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// 16-bit numbers at `address`, read in boxes with a swizzle of 128 bytes, zeros outside. Sizes are
    /// those of the tensor from its last dimension to its first.
    pub(super) fn new(
        address: Address,
        element: ElementKind,
        sizes: &[usize],
        boxes: &[u32],
    ) -> Result<Self> {
        use sys::CUtensorMapDataType::{
            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as F16,
        };
        let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::uninit();
        let strides: Vec<u64> = sizes[..sizes.len() - 1]
            .iter()
            .scan(2, |bytes, &size| {
                *bytes *= size as u64;
                Some(*bytes)
            })
            .collect();
        let steps = vec![1u32; sizes.len()];
        let counts: Vec<u64> = sizes.iter().map(|&size| size as u64).collect();
        // SAFETY: all arrays have as many entries as the map has dimensions, the strides one less; it is
        // written on success.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                if element == ElementKind::F16 {
                    F16
                } else {
                    BF16
                },
                sizes.len() as u32,
                address.0 as *mut _,
                counts.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .trying(format!(
                "describing a tensor of {sizes:?} to the copy engine"
            ))?;
            Ok(Self(map.assume_init()))
        }
    }
}
