//! The kernels' sources, and their compilation by NVRTC with a cache on the disk.

use super::{CudaError, Result};
use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest, Sha256};
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where compiled kernels are kept, if not in the user's cache folder.
const CACHE_VARIABLE: &str = "LIGHTMOE_KERNEL_CACHE";

/// Bytes of a hash.
const HASH: usize = 32;

/// One source file with what is compiled in front of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The name of its file, without the ending.
    pub name: &'static str,
    parts: &'static [&'static str],
    /// Whether it uses instructions that only Hopper has.
    pub hopper: bool,
}

impl Source {
    /// All that is compiled.
    pub(super) fn text(&self) -> String {
        self.parts.concat()
    }
}

const PTX: &str = include_str!("../../cuda/ptx.cuh");
const COMMON: &str = include_str!("../../cuda/common.cuh");
const HOPPER: &str = include_str!("../../cuda/hopper.cuh");
const ATTENTION_TILES: &str = include_str!("../../cuda/attention.cuh");
const CHOOSE: &str = include_str!("../../cuda/choose.cuh");

pub(super) const ROUTER: Source = Source {
    name: "router",
    parts: &[PTX, COMMON, include_str!("../../cuda/router.cu")],
    hopper: false,
};
pub(super) const ROUTE: Source = Source {
    name: "route",
    parts: &[PTX, COMMON, CHOOSE, include_str!("../../cuda/route.cu")],
    hopper: false,
};
pub(super) const GROUPED: Source = Source {
    name: "grouped",
    parts: &[PTX, COMMON, HOPPER, include_str!("../../cuda/grouped.cu")],
    hopper: true,
};
pub(super) const GROUPED_MMA: Source = Source {
    name: "grouped_mma",
    parts: &[PTX, COMMON, include_str!("../../cuda/grouped_mma.cu")],
    hopper: false,
};
pub(super) const ADAPTERS: Source = Source {
    name: "adapters",
    parts: &[PTX, COMMON, include_str!("../../cuda/adapters.cu")],
    hopper: false,
};
pub(super) const DECODE: Source = Source {
    name: "decode",
    parts: &[
        PTX,
        COMMON,
        CHOOSE,
        include_str!("../../cuda/decode.cuh"),
        include_str!("../../cuda/decode_route.cu"),
        include_str!("../../cuda/decode_experts.cu"),
    ],
    hopper: false,
};

pub(super) const BACKWARD: Source = Source {
    name: "backward",
    parts: &[PTX, COMMON, HOPPER, include_str!("../../cuda/backward.cu")],
    hopper: true,
};
pub(super) const BACKWARD_MMA: Source = Source {
    name: "backward_mma",
    parts: &[PTX, COMMON, include_str!("../../cuda/backward_mma.cu")],
    hopper: false,
};
pub(super) const ROWS: Source = Source {
    name: "rows",
    parts: &[PTX, COMMON, include_str!("../../cuda/rows.cu")],
    hopper: false,
};

pub(super) const ATTENTION: Source = Source {
    name: "attention",
    parts: &[
        PTX,
        COMMON,
        ATTENTION_TILES,
        include_str!("../../cuda/attention.cu"),
    ],
    hopper: false,
};
pub(super) const ATTENTION_BACKWARD: Source = Source {
    name: "attention_backward",
    parts: &[
        PTX,
        COMMON,
        ATTENTION_TILES,
        include_str!("../../cuda/attention_backward.cu"),
    ],
    hopper: false,
};
pub(super) const TOKENS: Source = Source {
    name: "tokens",
    parts: &[PTX, COMMON, include_str!("../../cuda/tokens.cu")],
    hopper: false,
};

pub(super) const PACK: Source = Source {
    name: "pack",
    parts: &[PTX, COMMON, include_str!("../../cuda/pack.cu")],
    hopper: false,
};

/// All sources.
pub const SOURCES: [Source; 13] = [
    ROUTER,
    ROUTE,
    GROUPED,
    GROUPED_MMA,
    ADAPTERS,
    DECODE,
    BACKWARD,
    BACKWARD_MMA,
    ROWS,
    ATTENTION,
    ATTENTION_BACKWARD,
    TOKENS,
    PACK,
];

/// A 16-bit float that kernels compute with; sums are in `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementKind {
    /// `bfloat16`
    Bf16,
    /// IEEE half precision
    F16,
}

/// What became of one source.
#[derive(Debug, Clone)]
pub struct Binary {
    /// Machine code: an ELF file for the driver.
    pub image: Vec<u8>,
    /// The same in NVIDIA's portable assembly.
    pub ptx: String,
    /// What the compiler said, the resources of every kernel among it.
    pub log: String,
}

/// Whether NVRTC can be loaded.
pub fn compiler_present() -> bool {
    #[cfg(feature = "linked")]
    return true;
    // SAFETY: only looks for the library.
    #[cfg(not(feature = "linked"))]
    unsafe {
        sys::is_culib_present()
    }
}

/// Compiles `source` for `architecture`, `sm_80` or `sm_90a` for example.
///
/// # Errors
/// If NVRTC is missing, or does not accept the source; the message has its log.
pub fn compile(source: &Source, element: ElementKind, architecture: &str) -> Result<Binary> {
    if !compiler_present() {
        return Err(CudaError::NoCompiler);
    }
    let failed = |log: String| CudaError::Compile {
        kernel: source.name,
        architecture: architecture.to_owned(),
        log,
    };
    let text = CString::new(source.text()).map_err(|e| failed(e.to_string()))?;
    let name = CString::new(format!("{}.cu", source.name)).map_err(|e| failed(e.to_string()))?;
    let program = nvrtc::create_program(&text, Some(&name)).map_err(|e| failed(e.to_string()))?;
    // SAFETY: the program lives until it is destroyed below, and its text as long; the buffers have the
    // sizes that NVRTC asks for.
    unsafe {
        let compiled = nvrtc::compile_program(program, &options(element, architecture));
        let log =
            nvrtc::get_program_log(program).map_or_else(|e| e.to_string(), |log| text_of(&log));
        let result = compiled.and_then(|()| {
            Ok(Binary {
                image: read(
                    |size| sys::nvrtcGetCUBINSize(program, size),
                    |to| sys::nvrtcGetCUBIN(program, to),
                )?,
                ptx: text_of(&nvrtc::get_ptx(program)?),
                log: log.clone(),
            })
        });
        // Nothing can be done about a program that does not go.
        let _ = nvrtc::destroy_program(program);
        result.map_err(|e| failed(format!("{e}\n{log}")))
    }
}

/// # Safety
/// `size` must give the number of bytes that `get` writes.
unsafe fn read(
    size: impl Fn(*mut usize) -> sys::nvrtcResult,
    get: impl Fn(*mut std::ffi::c_char) -> sys::nvrtcResult,
) -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut length = 0;
    size(&mut length).result()?;
    let mut bytes = vec![0u8; length];
    get(bytes.as_mut_ptr().cast()).result()?;
    Ok(bytes)
}

fn options(element: ElementKind, architecture: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        "--ptxas-options=-v".into(),
    ];
    if element == ElementKind::F16 {
        options.push("--define-macro=ELEMENT_F16".into());
    }
    options
}

fn text_of(bytes: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|&b| b as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|text| text.to_string_lossy().trim().to_owned())
        .unwrap_or_default()
}

/// As [`compile`], or from the cache: files are named by a hash of the source, the options, the compiler
/// and the driver, and begin with a hash of what follows, so that half a file is not taken for one. A cache
/// that cannot be written is done without.
pub(super) fn cached(
    source: &Source,
    element: ElementKind,
    architecture: &str,
    driver: i32,
) -> Result<Vec<u8>> {
    match cache_folder() {
        Some(folder) => cached_in(&folder, source, element, architecture, driver),
        None => Ok(compile(source, element, architecture)?.image),
    }
}

fn cached_in(
    folder: &Path,
    source: &Source,
    element: ElementKind,
    architecture: &str,
    driver: i32,
) -> Result<Vec<u8>> {
    let path = folder.join(file_name(source, element, architecture, driver));
    let stored = fs::read(&path).unwrap_or_default();
    if let Some((hash, image)) = stored.split_at_checked(HASH)
        && hash == Sha256::digest(image).as_slice()
    {
        return Ok(image.to_owned());
    }
    let image = compile(source, element, architecture)?.image;
    let _ = store(folder, &path, &image);
    Ok(image)
}

fn file_name(source: &Source, element: ElementKind, architecture: &str, driver: i32) -> String {
    let mut hash = Sha256::new();
    let (mut major, mut minor) = (0, 0);
    if compiler_present() {
        // SAFETY: writes two numbers.
        let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
    }
    let options = options(element, architecture).join("\0");
    for part in source.parts.iter().chain([&options.as_str()]) {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.update(format!("{major}.{minor} {driver}"));
    let digest: String = hash.finalize()[..16]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("{}-{architecture}-{digest}.cubin", source.name)
}

fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let of_user = || {
        let home = || variable("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(home)?;
        Some(cache.join("lightmoe").join("kernels"))
    };
    variable(CACHE_VARIABLE).map(PathBuf::from).or_else(of_user)
}

/// Written beside its place and moved there, so that no one reads half a file.
fn store(folder: &Path, path: &Path, image: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&Sha256::digest(image))?;
    file.write_all(image)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

    use super::*;
    use std::collections::HashSet;

    /// What changes the machine code, or may: the text, an option, the architecture, the driver.
    #[test]
    fn files_of_the_cache_are_named_by_all_that_they_depend_on() {
        use ElementKind::{Bf16, F16};
        let name =
            |element, architecture, driver| file_name(&ROUTER, element, architecture, driver);
        let names = [
            name(Bf16, "sm_80", 13_000),
            name(F16, "sm_80", 13_000),
            name(Bf16, "sm_90a", 13_000),
            name(Bf16, "sm_80", 13_010),
            file_name(&ROUTE, Bf16, "sm_80", 13_000),
        ];
        let digest = |name: &String| name.rsplit('-').next().map(str::to_owned);
        let digests: HashSet<_> = names.iter().map(digest).collect();
        assert_eq!(digests.len(), names.len(), "{names:?}");
        assert_eq!(name(Bf16, "sm_80", 13_000), names[0]);
        let longer = Source {
            parts: &[PTX, COMMON, include_str!("../../cuda/router.cu"), "\n"],
            ..ROUTER
        };
        assert_ne!(file_name(&longer, Bf16, "sm_80", 13_000), names[0]);
    }

    #[test]
    fn damaged_files_of_the_cache_are_compiled_again() {
        if !compiler_present() {
            eprintln!("SKIPPED: no NVRTC, so nothing was compiled");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let get = || cached_in(folder.path(), &ROUTER, ElementKind::Bf16, "sm_80", 1).unwrap();
        let first = get();
        let file = fs::read_dir(&folder)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        flipped[100] ^= 1;
        for damaged in [
            &whole[..0],
            &whole[..10],
            &whole[..whole.len() - 1],
            &flipped,
        ] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(get(), first);
            assert_eq!(fs::read(&file).unwrap(), whole);
        }
        fs::remove_dir_all(&folder).unwrap();
        fs::write(folder.path(), "no folder").unwrap();
        assert_eq!(get(), first);
    }
}
