//! A small Hub on the loopback address: one model or data set, `org/tiny`, large files on a second address, and
//! faults on demand.
#![allow(dead_code, reason = "every test binary uses its own part")]

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// The one commit that there is.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Names of the commit.
const REVISIONS: [&str; 4] = ["main", "v2", "refs%2Fpr%2F1", COMMIT];

/// What goes wrong with the next download of a file.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// All is promised, this much is sent.
    Breaks(usize),
    /// This much is promised and sent.
    Short(usize),
    /// Bytes too many are sent.
    Long,
    /// Nothing comes.
    Silent,
    /// Ten pieces come, with pauses between.
    Slow(Duration),
    /// The whole file is sent, whatever part was asked for.
    Whole,
    /// Another part is sent than was asked for.
    Elsewhere,
    /// A status without a body.
    Status(u16),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    storage: String,
    seen: Mutex<Vec<Seen>>,
    faults: Mutex<Vec<(String, Fault)>>,
}

/// The server; its threads end with the process.
pub struct Hub {
    pub endpoint: String,
    state: Arc<State>,
}

impl Hub {
    /// Serves these files.
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, storage) = (listen(), listen());
        let address = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let state = Arc::new(State {
            files,
            storage: address(&storage),
            seen: Mutex::default(),
            faults: Mutex::default(),
        });
        let endpoint = address(&hub);
        for listener in [hub, storage] {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    // A client that goes away is no error.
                    thread::spawn(move || state.serve(stream));
                }
            });
        }
        Self { endpoint, state }
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// Lets downloads of `file` go wrong, one after the other; a fault each.
    pub fn fail(&self, file: &str, faults: &[Fault]) {
        let faults = faults.iter().map(|&fault| (file.to_owned(), fault));
        self.state.faults.lock().unwrap().extend(faults);
    }
}

/// The files at the top of a folder.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|e| {
            (
                e.file_name().into_string().unwrap(),
                std::fs::read(e.path()).unwrap(),
            )
        })
        .collect()
}

impl State {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut lines = (&mut reader).lines();
        let first = lines.next().unwrap_or(Ok(String::new()))?;
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let mut words = first.split(' ').map(str::to_owned);
        let seen = Seen {
            method: words.next().unwrap_or_default(),
            path: words.next().unwrap_or_default(),
            headers,
        };
        self.seen.lock().unwrap().push(seen.clone());
        self.answer(&seen, &mut stream)
    }

    fn answer(&self, seen: &Seen, to: &mut TcpStream) -> std::io::Result<()> {
        let refuse = |to: &mut TcpStream, status: u16, code: &str| {
            head(to, status, &[("X-Error-Code", code.to_owned())], 0)
        };
        // Data sets have addresses with one word more than models.
        let path = seen.path.replace("/api/datasets/", "/api/models/");
        let path = path.replacen("/datasets/", "/", 1);
        let path = path.as_str();
        if let Some(file) = path.strip_prefix("/storage/") {
            return self.send(file, seen, to);
        }
        if path.contains("old/name") {
            let location = path.replace("old/name", "org/tiny");
            return head(to, 307, &[("Location", location)], 0);
        }
        if path.contains("org/gated/resolve") {
            return refuse(to, 401, "GatedRepo");
        }
        if path.contains("org/forbidden") {
            return refuse(to, 403, "");
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            let (repo, revision) = rest.split_once("/revision/").unwrap();
            if !["org/tiny", "org/gated"].contains(&repo) {
                return refuse(to, 401, "RepoNotFound");
            }
            if !REVISIONS.contains(&revision) {
                return refuse(to, 404, "RevisionNotFound");
            }
            let siblings: Vec<_> = self
                .files
                .keys()
                .map(|f| serde_json::json!({"rfilename": f}))
                .collect();
            let listing = serde_json::json!({"id": repo, "sha": COMMIT, "siblings": siblings});
            return write(to, 200, &[], listing.to_string().as_bytes());
        }
        let resolve = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"));
        let Some((file, bytes)) = resolve.and_then(|f| Some((f, self.files.get(f)?))) else {
            return refuse(to, 404, "EntryNotFound");
        };
        // As the Hub does: the SHA-256 of large files, another digest of small ones.
        let digest = Sha256::digest(bytes);
        let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        let large = file.ends_with(".safetensors");
        let etag = format!("\"{}\"", if large { &digest[..] } else { &digest[..40] });
        let commit = ("X-Repo-Commit", COMMIT.to_owned());
        if large {
            let facts = [
                commit,
                ("Location", format!("{}/storage/{file}", self.storage)),
                ("X-Linked-Etag", etag),
                ("X-Linked-Size", bytes.len().to_string()),
            ];
            return head(to, 302, &facts, 0);
        }
        match seen.method.as_str() {
            "HEAD" => {
                let facts = [commit, ("ETag", etag)];
                head(to, 200, &facts, bytes.len())
            }
            _ => self.send(file, seen, to),
        }
    }

    /// Sends a file or the asked part of it, or does what the next fault of the file wants.
    fn send(&self, file: &str, seen: &Seen, to: &mut TcpStream) -> std::io::Result<()> {
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            let next = faults.iter().position(|(of, _)| of == file);
            next.map(|i| faults.remove(i).1)
        };
        let all = self.files[file].as_slice();
        let range = seen.headers.get("range");
        let from = range.map(|r| r["bytes=".len()..].trim_end_matches('-').parse().unwrap());
        let (status, from) = match (from, fault) {
            (Some(from), Some(Fault::Elsewhere)) => (206, from - 1),
            (None, _) | (_, Some(Fault::Whole)) => (200, 0),
            (Some(from), _) => (206, from),
        };
        let part = &all[from..];
        let range = format!("bytes {from}-{}/{}", all.len() - 1, all.len());
        let facts = [("Content-Range", range)];
        let facts = if status == 206 { &facts[..] } else { &[] };
        match fault {
            Some(Fault::Status(status)) => head(to, status, &[], 0),
            Some(Fault::Silent) => {
                thread::sleep(Duration::from_secs(5));
                Ok(())
            }
            Some(Fault::Breaks(n)) => {
                head(to, status, facts, part.len())?;
                to.write_all(&part[..n])
            }
            Some(Fault::Short(n)) => write(to, status, facts, &part[..n]),
            Some(Fault::Long) => write(to, status, facts, &[part, b"more"].concat()),
            Some(Fault::Slow(pause)) => {
                head(to, status, facts, part.len())?;
                part.chunks(part.len().div_ceil(10)).try_for_each(|piece| {
                    thread::sleep(pause);
                    to.write_all(piece)
                })
            }
            Some(Fault::Whole | Fault::Elsewhere) | None => write(to, status, facts, part),
        }
    }
}

fn head(
    to: &mut TcpStream,
    status: u16,
    facts: &[(&str, String)],
    length: usize,
) -> std::io::Result<()> {
    let facts: String = facts.iter().map(|(k, v)| format!("{k}: {v}\r\n")).collect();
    write!(
        to,
        "HTTP/1.1 {status} So\r\nConnection: close\r\nContent-Length: {length}\r\n{facts}\r\n"
    )
}

fn write(
    to: &mut TcpStream,
    status: u16,
    facts: &[(&str, String)],
    body: &[u8],
) -> std::io::Result<()> {
    head(to, status, facts, body.len())?;
    to.write_all(body)
}
