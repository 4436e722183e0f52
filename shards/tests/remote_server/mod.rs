//! A small HTTP/1.1 server with ranges, on loopback, that does wrong what a test asks for.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use detco_shards::pipe::Pool;

/// What a request is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// As asked for.
    Well,
    /// This status and no object.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    DropAfter(usize),
    /// The object ends early, and the headers say so.
    Short(usize),
    /// One bit of the object is another.
    Corrupt,
    /// So many bytes every ten milliseconds.
    Slow(usize),
    /// Headers, so many bytes of the body, and then silence until the client goes.
    Silent(usize),
    /// These bytes, head and all.
    Raw(Vec<u8>),
}

impl Answer {
    /// A status line with these headers, each of which ends in `\r\n`, and a body of a stated length.
    pub(crate) fn of(status: &str, headers: &str, body: &[u8]) -> Answer {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        Answer::Raw([head.as_bytes(), body].concat())
    }
}

/// A request, as a rule sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without its first slash.
    pub(crate) path: String,
    /// File name.
    pub(crate) name: String,
    /// What follows the path's `?`.
    pub(crate) query: String,
    /// First byte asked for.
    pub(crate) from: u64,
    /// Last byte asked for, if one was named.
    pub(crate) to: Option<u64>,
    /// Headers, their names in lower case.
    pub(crate) headers: HashMap<String, String>,
    /// Requests for this name before.
    pub(crate) before: usize,
}

type Rule = dyn Fn(&Request) -> Answer + Send + Sync;

struct Shared {
    root: PathBuf,
    rule: Box<Rule>,
    log: Mutex<Vec<Request>>,
    counts: Mutex<HashMap<String, usize>>,
    ending: AtomicBool,
}

pub(crate) struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    _pool: Pool,
}

/// Who is not done by then hangs.
pub(crate) const HANG: Duration = Duration::from_secs(300);

/// Threads that answer.
const THREADS: usize = 24;

impl Server {
    /// Serves the files below `root`; `rule` says how each request is answered.
    pub(crate) fn start(
        root: &Path,
        rule: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            root: root.to_path_buf(),
            rule: Box::new(rule),
            log: Mutex::default(),
            counts: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        let (listener, mut pool) = (Arc::new(listener), Pool::new());
        for thread in 0..THREADS {
            let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
            let body = move || {
                while let Ok((stream, _)) = listener.accept() {
                    if shared.ending.load(Ordering::Relaxed) {
                        return;
                    }
                    // A client may go away in the middle: that is its business.
                    let _ = shared.serve(stream);
                }
            };
            pool.start(format!("server-{thread}"), body).expect("starts");
        }
        Server { shared, address, _pool: pool }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// All requests so far.
    pub(crate) fn log(&self) -> Vec<Request> {
        self.shared.log.lock().expect("no panic").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        for _ in 0..THREADS {
            // Wakes one thread each; the pool joins them afterwards.
            let _ = TcpStream::connect(self.address);
        }
    }
}

/// `%2F` to `/`.
fn decoded(path: &str) -> String {
    let mut parts = path.split('%');
    let first = parts.next().unwrap_or("").to_owned();
    parts.fold(first, |text, part| {
        let (code, rest) = part.split_at(2);
        let byte = u8::from_str_radix(code, 16).expect("two hex digits");
        format!("{text}{}{rest}", char::from(byte))
    })
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(HANG))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let Some(first) = lines.next().transpose()? else { return Ok(()) };
        let mut words = first.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or("/"));
        let mut headers = HashMap::new();
        for line in lines {
            let line = line?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(": ") {
                headers.insert(name.to_ascii_lowercase(), value.to_owned());
            }
        }
        let range = headers.get("range").and_then(|range| range.strip_prefix("bytes="));
        let (from, to) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
        let (from, to) = (from.parse().unwrap_or(0), to.parse().ok());
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let (path, query) = (decoded(path.trim_start_matches('/')), query.to_owned());
        let name = path.rsplit('/').next().unwrap_or("").to_owned();
        let mut counts = self.counts.lock().expect("no panic");
        let count = counts.entry(name.clone()).or_insert(0);
        let (method, before) = (method.to_owned(), *count);
        let request =
            Request { method, path: path.clone(), name, query, from, to, headers, before };
        *count += 1;
        drop(counts);
        // First into the log, since a rule may wait for something.
        self.log.lock().expect("no panic").push(request.clone());
        let answer = (self.rule)(&request);
        self.answer(stream, &request, &path, answer)
    }

    fn answer(
        &self,
        mut stream: TcpStream,
        request: &Request,
        path: &str,
        answer: Answer,
    ) -> std::io::Result<()> {
        let status = |number: u16| {
            format!("HTTP/1.1 {number} Because\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        };
        match answer {
            Answer::Status(number) => return stream.write_all(status(number).as_bytes()),
            Answer::Raw(bytes) => return stream.write_all(&bytes),
            _ => {}
        }
        let Ok(mut object) = std::fs::read(self.root.join(path)) else {
            return stream.write_all(status(404).as_bytes());
        };
        match answer {
            Answer::Short(bytes) => object.truncate(bytes),
            Answer::Corrupt => {
                let middle = object.len() / 2;
                object[middle] ^= 4;
            }
            _ => {}
        }
        let (from, whole) = (request.from as usize, object.len());
        let to = request.to.map_or(whole, |to| whole.min(to as usize + 1));
        if from > whole || whole == 0 && request.to.is_some() {
            return stream.write_all(status(416).as_bytes());
        }
        let mut headers = match (from, request.to) {
            (0, None) => "HTTP/1.1 200 OK\r\n".to_owned(),
            _ => format!(
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{whole}\r\n",
                to - 1
            ),
        };
        let etag = "ETag: \"one\"\r\nLast-Modified: Tue, 01 Jan 1980 00:00:00 GMT\r\n";
        headers += &format!("Content-Length: {}\r\n{etag}Connection: close\r\n\r\n", to - from);
        stream.write_all(headers.as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        let body = &object[from..to];
        match answer {
            Answer::DropAfter(bytes) => stream.write_all(&body[..bytes.min(body.len())]),
            Answer::Slow(bytes) => {
                for piece in body.chunks(bytes) {
                    stream.write_all(piece)?;
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(())
            }
            Answer::Silent(bytes) => {
                stream.write_all(&body[..bytes.min(body.len())])?;
                while stream.read(&mut [0; 64])? > 0 {}
                Ok(())
            }
            _ => stream.write_all(body),
        }
    }
}
