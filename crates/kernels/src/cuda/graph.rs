//! Work that is recorded once and queued many times.

use super::device::Gpu;
use super::{CudaError, Result, Trying};
use cudarc::driver::{CudaGraph, sys};
use std::marker::PhantomData;

impl Gpu {
    /// Records what `work` queues, to be queued again with one call. The kernels must have run before, and
    /// nothing may be taken, copied to the GPU or from it meanwhile.
    ///
    /// # Errors
    /// If `work` fails or queues what cannot be recorded.
    pub fn capture<'a>(&self, work: impl FnOnce() -> Result<()> + 'a) -> Result<Graph<'a>> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THREAD_LOCAL;
        self.stream()
            .begin_capture(THREAD_LOCAL)
            .trying("beginning to record a graph")?;
        let done = work();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream().end_capture(flags).trying("recording a graph");
        done?;
        let graph = graph?.ok_or_else(|| CudaError::Shape("nothing was recorded".into()))?;
        Ok(Graph {
            graph,
            memory: PhantomData,
        })
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
    /// How many kernels and copies were recorded.
    #[cfg(test)]
    pub(super) fn launches(&self) -> usize {
        let mut count = 0;
        // SAFETY: the graph is there, and without a place for nodes they are only counted.
        let done = unsafe {
            sys::cuGraphGetNodes(self.graph.cu_graph(), std::ptr::null_mut(), &raw mut count)
        };
        assert_eq!(done, sys::CUresult::CUDA_SUCCESS);
        count
    }

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
