//! The program on shards behind URLs: what it prints of them, and what it does when they are wrong.

#[expect(dead_code, reason = "most of what can go wrong is tested in the data plane")]
#[path = "../shards/tests/remote_server/mod.rs"]
mod remote_server;
mod support;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use detco::config::{Bytes, Window};
use detco::data;
use detco_shards::stream::ShardSet;
use remote_server::{Answer, Server};
use serde_json::Value;
use support::{DETCO, detco_fails, detco_ok, path, shards};

/// A hundred images in five shards, and the folder that holds them.
fn packed() -> tempfile::TempDir {
    shards(25).0
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn inspect_and_verify_say_of_a_url_what_they_say_of_its_folder() {
    let folder = packed();
    let server = Server::start(folder.path(), |_| Answer::Well);
    let (url, local) = (server.url("shards"), folder.path().join("shards"));
    let cache = folder.path().join("cache");
    let cache = path(&cache);

    let mut ours = parse(&detco_ok(&["inspect", &url, "--json", "--cache", cache]));
    let mut theirs = parse(&detco_ok(&["inspect", path(&local), "--json"]));
    let manifest = ours["manifests"][0]["path"].take();
    assert_eq!(manifest, format!("{url}/manifest.json"));
    theirs["manifests"][0]["path"].take();
    assert_eq!(ours, theirs);

    let mut ours = parse(&detco_ok(&["verify", &url, "--json", "--cache", cache]));
    let theirs = parse(&detco_ok(&["verify", path(&local), "--json"]));
    assert_eq!(ours, theirs);
    assert_eq!(ours["faults"].take(), Value::Array(Vec::new()));
    let sheet = folder.path().join("views.png");
    let set = format!("data.cache={cache}");
    detco_ok(&["views", &url, "-o", path(&sheet), "--samples", "2", "--set", &set]);
}

#[test]
fn a_wrong_shard_and_a_small_cache_are_told_by_url() {
    let folder = packed();
    let server = Server::start(folder.path(), |request| match request.name.as_str() {
        "000003.tar" => Answer::Corrupt,
        _ => Answer::Well,
    });
    let url = server.url("shards");
    let cache = folder.path().join("cache");
    let cache = path(&cache);
    let error = detco_fails(&["verify", &url, "--cache", cache], 1);
    assert!(error.contains("1 fault in"), "{error}");
    let error = detco_fails(&["inspect", &url, "--cache", cache, "--cache-size", "1kB"], 1);
    assert!(error.contains("no room for its") && error.contains(&url), "{error}");
    let set = format!("data.cache={cache}");
    let size = ["--set", "data.window=3", "--set", "data.cache_size=150kB"];
    let words = ["profile", &url, "--set", &set];
    let error = detco_fails(&[&words[..], &size].concat(), 1);
    assert!(error.contains("data.window = 3 needs"), "{error}");
    let error = detco_fails(&["profile", &url, "--set", &set, "--cold"], 1);
    assert!(error.contains("data.cache"), "{error}");
}

/// What is secret in a URL is neither printed nor written, by commands that succeed and by those that do
/// not; and a store that does not answer has an exit code.
#[test]
fn secrets_in_urls_are_printed_nowhere() {
    let folder = packed();
    let server = Server::start(folder.path(), |request| match request.name.as_str() {
        "000003.tar" if request.query.contains("bad") => Answer::Corrupt,
        _ => Answer::Well,
    });
    let cache = folder.path().join("cache");
    let url = |query: &str| {
        let url = server.url(&format!("shards?{query}&sig=signed-by-me"));
        url.replace("http://", "http://me:pass-word@")
    };
    let none = |said: &str| {
        assert!(!said.contains("pass-word") && !said.contains("signed-by-me"), "{said}");
        assert!(said.contains("?…"), "{said}");
    };
    let cached = ["--cache", path(&cache)];
    let (good, bad) = (url("good=1"), url("bad=1"));
    none(&detco_ok(&[&["verify", &good][..], &cached].concat()));
    let said = detco_ok(&[&["inspect", &good, "--json"][..], &cached].concat());
    assert!(!said.contains("pass-word") && !said.contains("signed-by-me"), "{said}");
    let set = format!("data.cache={}", path(&cache));
    let profile = ["profile", &good, "--seconds", "1", "--workers", "1", "--set", &set];
    none(&detco_ok(&profile));
    let fresh = folder.path().join("fresh");
    let error = detco_fails(&["verify", &bad, "--cache", path(&fresh)], 1);
    none(&error);
    assert!(error.contains("1 fault in"), "{error}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = format!("http://me:pass-word@{nobody}/shards?sig=signed-by-me");
    for command in ["inspect", "verify"] {
        none(&detco_fails(&[&[command, &nowhere][..], &cached].concat(), 69));
    }
}

/// A window is what the cache allows, or what was asked for if it does.
#[test]
fn windows_follow_the_room() {
    let folder = packed();
    let server = Server::start(folder.path(), |_| Answer::Well);
    let window = |wanted: Window, bytes: u64| {
        let cache = tempfile::tempdir().unwrap();
        let options = data::remote_in(cache.path(), Bytes(bytes));
        let set = ShardSet::open_with(&[server.url("shards")], Some(&options)).unwrap();
        data::window(wanted, &set).map_err(|error| error.to_string())
    };
    let local = ShardSet::open(&[path(&folder.path().join("shards")).to_owned()]).unwrap();
    let mut sizes: Vec<u64> = local.shards().iter().map(|shard| shard.bytes()).collect();
    sizes.sort_unstable();
    // A fiftieth is for indexes.
    let room = |shards: usize| sizes[5 - shards..].iter().sum::<u64>() * 50 / 49 + 2;
    assert_eq!(window(Window::Auto, room(5)), Ok(Window::All));
    assert_eq!(window(Window::All, room(5)), Ok(Window::All));
    // Two windows and a shard on its way.
    assert_eq!(window(Window::Auto, room(5) - 1000), Ok(Window::Shards(1)));
    assert_eq!(window(Window::Auto, room(3)), Ok(Window::Shards(1)));
    assert_eq!(window(Window::Shards(1), room(3)), Ok(Window::Shards(1)));
    for (wanted, bytes) in [
        (Window::Auto, room(3) - 1000),
        (Window::Shards(2), room(5) - 1000),
        (Window::All, room(5) - 1000),
    ] {
        let error = window(wanted, bytes).unwrap_err();
        assert!(error.contains("in the cache at once"), "{error}");
    }
    assert_eq!(data::window(Window::Auto, &local).unwrap(), Window::All);
    assert_eq!(data::window(Window::Shards(2), &local).unwrap(), Window::Shards(2));
}

/// A server that gives 200 kB/s: fetching is what limits, and the profile says so, with figures.
#[test]
fn a_profile_of_a_slow_store_names_fetching() {
    let folder = packed();
    let server = Server::start(folder.path(), |request| match request.name.ends_with(".tar") {
        true => Answer::Slow(512),
        false => Answer::Well,
    });
    let set = format!("data.cache={}", folder.path().join("cache").display());
    // Windows of one shard: a cache that holds three, and indexes.
    let most = folder
        .path()
        .join("shards")
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len());
    let size = format!("data.cache_size={}", most.max().unwrap() * 7 / 2 + 8_000);
    let words =
        ["profile", &server.url("shards"), "--mode", "decode", "--batch", "10", "--workers", "1"];
    let more = ["--seconds", "2", "--warm-up", "0", "--json", "-", "--set", &set, "--set", &size];
    let more = [&more[..], &["--set", "data.fetches=2"]].concat();
    let report = parse(&detco_ok(&[&words[..], &more].concat()));
    assert_eq!(report["verdict"]["bottleneck"], "fetch", "{}", report["verdict"]);
    let fetched = &report["runs"][0]["fetched"];
    let number = |name: &str| fetched[name].as_f64().unwrap_or_else(|| panic!("{name}: {fetched}"));
    assert!(number("megabytes_per_s") > 0.0 && number("shards") >= 1.0, "{fetched}");
    assert!(number("wait_share") > 0.5 && number("at_a_time") > 0.5, "{fetched}");
    assert!(fetched["waits"]["count"].as_u64().unwrap() >= 1, "{fetched}");
}

/// Serves a folder over TLS, with a certificate of its own making, until dropped.
struct Tls {
    child: Child,
    url: String,
    certificate: PathBuf,
}

impl Tls {
    fn start(root: &Path, certificate: PathBuf) -> Tls {
        let program = r#"
import datetime, functools, http.server, pathlib, ssl, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
root, file = map(pathlib.Path, sys.argv[1:])
key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
name, day = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "detco test")]), datetime.timedelta(days=1)
builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
builder = builder.serial_number(7).not_valid_before(now - day).not_valid_after(now + day)
builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
text = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
file.write_bytes(text)
plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
both = file.with_suffix(".both")
both.write_bytes(text + key.private_bytes(serialization.Encoding.PEM, *plain))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(both)
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root))
server.handle_error = lambda *_: None
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
"#;
        let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
        let python = std::env::var_os("DETCO_PYTHON").map_or_else(own, PathBuf::from);
        let mut command = Command::new(python);
        command.args(["-c", program]).arg(root).arg(&certificate).stdout(Stdio::piped());
        let mut child = command.spawn().expect("`cargo xtask setup` brings Python's packages");
        let mut port = String::new();
        let mut said = BufReader::new(child.stdout.take().expect("is piped"));
        said.read_line(&mut port).expect("the server says its port");
        assert!(!port.trim().is_empty(), "the server does not start");
        Tls { child, url: format!("https://localhost:{}/shards", port.trim()), certificate }
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// A certificate that the machine does not know is refused by name; one that `SSL_CERT_FILE` holds is
/// known.
#[test]
fn tls_is_spoken_and_certificates_are_checked() {
    let folder = packed();
    let server = Tls::start(folder.path(), folder.path().join("certificate.pem"));
    let cache = folder.path().join("cache");
    let args = ["verify", &server.url, "--cache", path(&cache)];
    let error = detco_fails(&args, 69);
    assert!(error.contains("certificate") && error.contains(&server.url), "{error}");
    let knows = ("SSL_CERT_FILE", &server.certificate);
    let output = Command::new(DETCO).args(args).env(knows.0, knows.1).output().unwrap();
    let (said, error) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{error}");
    assert!(String::from_utf8_lossy(&said).contains("sound: 100 samples in 5 shards"), "{error}");
}
