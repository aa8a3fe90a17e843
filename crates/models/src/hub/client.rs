//! Requests to the Hub, and downloads that end whole or say why not.

use super::{HubName, HubOptions, OnBytes};
use crate::{Error, Result};
use hf_hub::api::RepoInfo;
use hf_hub::{CacheRepo, Repo};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, Uri};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

/// Attempts at a file that bring nothing, one after the other, before it is given up.
const ATTEMPTS: u32 = 3;
/// After an attempt that brought something, longer after others; and between two looks at a lock.
const PAUSE: Duration = Duration::from_millis(100);
/// Redirects within the Hub, of a repository that was renamed.
const REDIRECTS: usize = 5;
const CHUNK: usize = 1 << 17;

/// Requests about one model or data set.
pub(super) struct Client<'a> {
    agent: Agent,
    name: &'a HubName,
    options: &'a HubOptions,
    repo: Repo,
    cache: &'a CacheRepo,
}

/// What the Hub says of a file.
struct Remote {
    url: String,
    etag: String,
    size: u64,
}

impl<'a> Client<'a> {
    pub(super) fn new(name: &'a HubName, options: &'a HubOptions, cache: &'a CacheRepo) -> Self {
        let wait = Some(options.timeout);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("lightmoe/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_per_read(wait);
        Self {
            agent: config.build().into(),
            name,
            options,
            repo: name.repo(),
            cache,
        }
    }

    /// The commit that the revision is, and the names of its files.
    pub(super) fn listing(&self) -> Result<(String, Vec<String>)> {
        let url = format!("{}/api/{}", self.options.endpoint, self.repo.api_url());
        let mut response = self.call(&url, None, self.agent.get(&url))?;
        let info: RepoInfo = response
            .body_mut()
            .read_json()
            .map_err(|e| self.broken(&url, e))?;
        if !is_plain(&info.sha) {
            return Err(self.strange(&url, "names no commit"));
        }
        let files = info.siblings.into_iter().map(|s| s.rfilename);
        Ok((info.sha, files.collect()))
    }

    /// Puts a file of a commit into the cache, if it is not there.
    pub(super) fn bring(&self, commit: &str, file: &str, on_bytes: &mut OnBytes<'_>) -> Result<()> {
        let pointer = self.cache.pointer_path(commit).join(file);
        let (endpoint, repo) = (&self.options.endpoint, self.repo.url());
        let url = format!("{endpoint}/{repo}/resolve/{commit}/{file}");
        let mut fruitless = 0;
        while !pointer.exists() {
            let (mut first, mut last) = (None, (0, 0));
            let outcome = self.attempt(&url, file, &pointer, &mut |file, done, all| {
                first.get_or_insert(done);
                last = (done, all);
                on_bytes(file, done, all)
            });
            let Err(error) = outcome else { break };
            fruitless = match last.0 > first.unwrap_or_default() {
                true => 0,
                false => fruitless + 1,
            };
            if fruitless == ATTEMPTS || !matches!(error, Error::Hub(_)) {
                return Err(error);
            }
            if !on_bytes(file, last.0, last.1) {
                return Err(Error::Interrupted);
            }
            sleep(PAUSE * 3u32.pow(fruitless));
        }
        Ok(())
    }

    fn attempt(
        &self,
        url: &str,
        file: &str,
        pointer: &Path,
        on_bytes: &mut OnBytes<'_>,
    ) -> Result<()> {
        let remote = self.head(url, file)?;
        let blob = self.cache.blob_path(&remote.etag);
        let mut go_on = |done| match on_bytes(file, done, remote.size) {
            true => Ok(()),
            false => Err(Error::Interrupted),
        };
        let _lock = self.lock(&remote.etag, &mut || go_on(0))?;
        // Another program may have brought it while we waited.
        if !blob.exists() {
            let partial = self.cache.blob_path(&format!("{}.incomplete", remote.etag));
            make_parent(&partial)?;
            let continued = fs::metadata(&partial).is_ok_and(|found| found.len() > 0);
            self.download(&remote, file, &partial, &mut go_on)?;
            self.verify(&remote, file, &partial, continued)?;
            fs::rename(&partial, &blob).map_err(|e| Error::io(&blob, e))?;
        }
        make_parent(pointer)?;
        if pointer.is_symlink() {
            fs::remove_file(pointer).map_err(|e| Error::io(pointer, e))?;
        }
        let target = Path::new("../../blobs").join(&remote.etag);
        symlink(target, pointer).map_err(|e| Error::io(pointer, e))
    }

    /// What the Hub says of a file, and where it lies.
    fn head(&self, url: &str, file: &str) -> Result<Remote> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let request = self.agent.head(&url).config().max_redirects(0).build();
            let response = self.call(&url, Some(file), request)?;
            let header = |name| header(&response, name);
            let (location, linked) = (header("location"), header("x-linked-etag"));
            // Another server is left to the download, unless the Hub leaves the facts to it too.
            if let Some(next) = location.filter(|l| l.starts_with('/') || linked.is_none()) {
                url = match next.starts_with('/') {
                    true => format!("{}{next}", origin(&url)),
                    false => next.to_owned(),
                };
                continue;
            }
            let etag = linked
                .or(header("etag"))
                .map(|e| e.trim_start_matches("W/").trim_matches('"'));
            let size = header("x-linked-size").or(match location {
                Some(_) => None,
                None => header("content-length"),
            });
            return match (etag, size.and_then(|s| s.parse().ok())) {
                (Some(etag), Some(size)) if is_plain(etag) => Ok(Remote {
                    etag: etag.to_owned(),
                    size,
                    url: location.map_or(url.clone(), str::to_owned),
                }),
                _ => Err(self.strange(&url, "gives no ETag or size")),
            };
        }
        Err(self.strange(&url, "redirects in a circle"))
    }

    /// Completes a partial file.
    fn download(
        &self,
        remote: &Remote,
        file: &str,
        partial: &Path,
        go_on: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let (url, size) = (&remote.url, remote.size);
        let io = |e| Error::io(partial, e);
        let mut options = OpenOptions::new();
        let mut out = options
            .create(true)
            .append(true)
            .open(partial)
            .map_err(io)?;
        let mut done = out.metadata().map_err(io)?.len();
        if done > size {
            out.set_len(0).map_err(io)?;
            done = 0;
        }
        go_on(done)?;
        if done < size {
            let mut request = self.agent.get(url);
            if done > 0 {
                request = request.header("range", format!("bytes={done}-"));
            }
            let response = self.call(url, Some(file), request)?;
            let range = header(&response, "content-range").unwrap_or_default();
            match response.status().as_u16() {
                206 if range.starts_with(&format!("bytes {done}-")) => {}
                200 => {
                    out.set_len(0).map_err(io)?;
                    done = 0;
                }
                _ => return Err(self.strange(url, "answers with another part of the file")),
            }
            let mut body = response.into_body().into_reader();
            let mut chunk = vec![0; CHUNK];
            while done <= size {
                let read = body
                    .read(&mut chunk)
                    .map_err(|e| self.broken(url, e.into()))?;
                if read == 0 {
                    break;
                }
                out.write_all(&chunk[..read]).map_err(io)?;
                done += read as u64;
                go_on(done.min(size))?;
            }
        }
        if done > size {
            out.set_len(0).map_err(io)?;
            go_on(0)?;
        }
        if done != size {
            let message = format!("sent {done} bytes of `{file}`, which has {size}");
            return Err(self.strange(url, &message));
        }
        out.sync_all().map_err(io)
    }

    /// Compares the content with the SHA-256 that the Hub gives large files for an ETag. What differs
    /// is thrown away; where it was `continued`, the part may be to blame, and another attempt is worth
    /// it.
    fn verify(&self, remote: &Remote, file: &str, partial: &Path, continued: bool) -> Result<()> {
        let etag = &remote.etag;
        if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(());
        }
        let io = |e| Error::io(partial, e);
        let mut hash = Sha256::new();
        std::io::copy(&mut File::open(partial).map_err(io)?, &mut hash).map_err(io)?;
        let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        if found == etag.to_lowercase() {
            return Ok(());
        }
        fs::remove_file(partial).map_err(io)?;
        let message = format!("sent `{file}` with other content than it names");
        match self.strange(&remote.url, &message) {
            Error::Hub(message) if !continued => Err(Error::Invalid(message)),
            again => Err(again),
        }
    }

    /// The lock of a blob, the same as that of other programs; given back when dropped.
    fn lock(&self, etag: &str, go_on: &mut dyn FnMut() -> Result<()>) -> Result<File> {
        let locks = self.options.cache.join(".locks");
        let path = locks
            .join(self.repo.folder_name())
            .join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => go_on()?,
                Err(TryLockError::Error(e)) => return Err(Error::io(&path, e)),
            }
            sleep(PAUSE);
        }
    }

    /// Sends a request, to the Hub with the token; a refusal is an error.
    fn call(
        &self,
        url: &str,
        file: Option<&str>,
        request: RequestBuilder<WithoutBody>,
    ) -> Result<Response<Body>> {
        // Compressed on the way, a file would have another length.
        let mut request = request.header("accept-encoding", "identity");
        let ours = origin(url) == origin(&self.options.endpoint);
        if let Some(token) = self.options.token.as_ref().filter(|_| ours) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| self.broken(url, e))?;
        let status = response.status();
        match status.is_success() || status.is_redirection() {
            true => Ok(response),
            false if ours => Err(self.refusal(&response, url, file)),
            false => Err(self.strange(url, &format!("answers {status}"))),
        }
    }

    fn refusal(&self, response: &Response<Body>, url: &str, file: Option<&str>) -> Error {
        let (id, endpoint) = (self.name.id(), &self.options.endpoint);
        let (kind, page) = (self.name.kind(), self.repo.url());
        let code = header(response, "x-error-code").unwrap_or_default();
        Error::Invalid(match (response.status().as_u16(), code, file) {
            (401 | 403, "GatedRepo", _) => format!(
                "`{id}` is gated; accept its terms at {endpoint}/{page} and set HF_TOKEN to a token \
                 of yours"
            ),
            (404, "RevisionNotFound", _) => format!(
                "`{id}` on {endpoint} has no revision `{}`; give a branch, tag or commit that it has",
                self.name.revision()
            ),
            (404, _, Some(file)) => format!(
                "`{}` on {endpoint} has no file `{file}`, though it names it; give another revision",
                self.name
            ),
            (401 | 404, _, _) => format!(
                "`{id}` is no folder here, and {endpoint} has or shows no such {kind}; check the \
                 name, and set HF_TOKEN if the {kind} is private or gated"
            ),
            (403, _, _) => format!(
                "{endpoint} does not let you read `{id}`; ask its owner for access, and set HF_TOKEN \
                 to a token that may read it"
            ),
            (status, _, _) => return self.strange(url, &format!("answers {status}")),
        })
    }

    /// The connection failed.
    fn broken(&self, url: &str, error: ureq::Error) -> Error {
        let server = origin(url);
        let seconds = self.options.timeout.as_secs_f64();
        Error::Hub(match error {
            ureq::Error::Timeout(_) => format!(
                "{server} was silent for {seconds} s; try again, what has come is kept, or give it \
                 more seconds in HF_HUB_DOWNLOAD_TIMEOUT"
            ),
            e => format!(
                "no answer from {server}: {e}; check the network and try again, what has come is \
                 kept, or set HF_HUB_OFFLINE=1 to use the cache alone"
            ),
        })
    }

    /// The server did not keep to its word.
    fn strange(&self, url: &str, what: &str) -> Error {
        Error::Hub(format!(
            "{} {what} (`{}`); try again later, what has come is kept",
            origin(url),
            self.name
        ))
    }
}

/// Fit to be the name of a file.
fn is_plain(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty() && text.chars().all(plain)
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// `scheme://host:port` of an address.
fn origin(url: &str) -> String {
    let uri: Uri = url.parse().unwrap_or_default();
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
        _ => url.to_owned(),
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))
}
