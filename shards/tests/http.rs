//! Shards over HTTP as RFC 9110 has it and as servers are: signatures, tokens, redirects, ranges,
//! validators, lengths, compression, and pages in place of files.

#[expect(dead_code, reason = "no oracle in Python")]
mod common;
#[expect(dead_code, reason = "how connections fail is tested in remote.rs")]
mod remote_server;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::jpeg;
use detco_shards::format::{RemoteFault, ShardError};
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample, PipelineError, Views};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::{Patience, RemoteOptions, verify};
use detco_shards::views::Recipe;
use remote_server::{Answer, HANG, Request, Server};

/// Samples of a shard made here.
const SAMPLES: u32 = 6;

/// Quick to give up, so that tests are quick.
fn options(cache: &Path) -> RemoteOptions {
    let patience =
        Patience { attempts: 3, pause: Duration::from_millis(5), stall: HANG, room: HANG };
    RemoteOptions { patience, ..RemoteOptions::new(cache, 1 << 30) }
}

fn with(options: RemoteOptions, variables: &[(&str, &str)]) -> RemoteOptions {
    let environment = variables.iter().map(|(key, value)| ((*key).into(), (*value).into()));
    RemoteOptions { environment: environment.collect(), ..options }
}

fn open(url: &str, options: &RemoteOptions) -> Result<ShardSet, ShardError> {
    ShardSet::open_with(&[url.to_owned()], Some(options))
}

/// A tar of images with these names, each with a class.
fn tar(first: u32, name: impl Fn(u32) -> String) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for number in first..first + SAMPLES {
        let image = jpeg(number, 40 + number, 32);
        for (extension, bytes) in [("jpg", image.as_slice()), ("cls", b"1".as_slice())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let name = format!("{}.{extension}", name(number));
            tar.append_data(&mut header, name, bytes).expect("appends");
        }
    }
    tar.into_inner().expect("ends")
}

/// Two shards without index and manifest, in a folder `set`.
struct Bare {
    root: tempfile::TempDir,
}

impl Bare {
    fn new() -> Bare {
        let root = tempfile::tempdir().expect("a folder");
        let bare = Bare { root };
        std::fs::create_dir(bare.root.path().join("set")).expect("creates");
        for shard in 0..2 {
            bare.put(
                &format!("{shard}.tar"),
                &tar(shard * SAMPLES, |number| format!("{number:04}")),
            );
        }
        bare
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("writes");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("set").join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("reads")
    }

    fn local(&self, name: &str) -> ShardSet {
        ShardSet::open(&[self.path(name).display().to_string()]).expect("opens")
    }

    fn serve(&self, rule: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Server {
        Server::start(self.root.path(), rule)
    }
}

/// Everything that can be read of a set is as in the local one.
fn same(remote: &ShardSet, local: &ShardSet) {
    assert_eq!((remote.len(), remote.fingerprint()), (local.len(), local.fingerprint()));
    for id in 0..local.len() {
        let (ours, theirs) = (remote.sample(id).expect("remote"), local.sample(id).expect("local"));
        assert_eq!((ours.key, ours.offset), (theirs.key, theirs.offset));
        assert_eq!(ours.class().expect("a class"), theirs.class().expect("a class"));
        assert_eq!(ours.jpeg(), theirs.jpeg());
    }
}

fn fault(error: &ShardError) -> &RemoteFault {
    error.remote_fault().unwrap_or_else(|| panic!("{error}"))
}

fn says(error: &ShardError, words: &[&str]) {
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}: {words:?}");
}

/// Nothing in the cache, its names included, holds any of these words.
fn keeps_none_of(cache: &Path, words: &[&str]) {
    for entry in std::fs::read_dir(cache).expect("lists") {
        let path = entry.expect("an entry").path();
        let name = path.display().to_string();
        let bytes = std::fs::read(&path).expect("reads");
        let text = String::from_utf8_lossy(&bytes);
        assert!(words.iter().all(|word| !name.contains(word) && !text.contains(word)), "{name}");
    }
}

/// Whole shards in the cache.
fn cached(cache: &Path) -> usize {
    let names = std::fs::read_dir(cache).expect("lists").map(|entry| entry.expect("an entry"));
    names.filter(|entry| entry.file_name().to_string_lossy().ends_with(".tar")).count()
}

fn tars(server: &Server) -> Vec<Request> {
    let mut log = server.log();
    log.retain(|request| request.name.ends_with(".tar"));
    log
}

#[test]
fn a_signed_url_is_asked_with_get_alone_and_its_signature_is_kept_nowhere() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match request.query.as_str() {
        _ if request.method != "GET" => Answer::Status(403),
        _ if !request.name.ends_with(".tar") => Answer::Status(403), // signed for the shards alone
        "X-Amz-Date=1&X-Amz-Signature=a%2Fsecret1" | "X-Amz-Date=2&X-Amz-Signature=secret2" => {
            Answer::Well
        }
        _ => Answer::of("403 Forbidden", "x-amz-error-code: AccessDenied\r\n", b"secret1"),
    });
    let url = |query: &str| server.url(&format!("set/{{0..1}}.tar?{query}"));
    let set = open(&url("X-Amz-Date=1&X-Amz-Signature=a%2Fsecret1"), &options(cache.path()));
    let set = set.expect("opens");
    same(&set, &data.local("{0,1}.tar"));
    assert_eq!(set.shards()[0].path(), Path::new(&server.url("set/0.tar?…")));
    drop(set);
    // Signed anew, it is the same object: only sizes are asked for.
    let before = tars(&server).len();
    let again = open(&url("X-Amz-Date=2&X-Amz-Signature=secret2"), &options(cache.path()));
    same(&again.expect("opens"), &data.local("{0,1}.tar"));
    let asked = tars(&server).split_off(before);
    assert!(asked.iter().all(|request| request.to == Some(511)), "{asked:?}");
    keeps_none_of(cache.path(), &["secret", "X-Amz"]);

    let error = open(&url("X-Amz-Date=3&X-Amz-Signature=secret3"), &options(cache.path()));
    let error = error.expect_err("expired");
    says(
        &error,
        &["set/0.tar?…", "refused with 403 (AccessDenied): the signature may have expired"],
    );
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
}

#[test]
fn a_signature_that_expires_in_the_middle_is_named_and_no_sample_is_bad() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let index = |name: &str| {
        let bytes = data.bytes(&format!("{name}.tar"));
        let text = detco_shards::format::index::IndexText::of(&bytes).expect("a tar").finish();
        data.put(&format!("{name}.idx"), text.as_bytes());
    };
    index("0");
    index("1");
    let server = data.serve(|request| match request.name.as_str() {
        "1.tar" if request.to.is_none() => Answer::Status(403),
        _ => Answer::Well,
    });
    let url = server.url("set/{0,1}.tar?sv=1&sig=abcdefgh");
    let set = Arc::new(open(&url, &options(cache.path())).expect("opens"));
    let error = ended(&set, OnBadSample::Skip);
    let PipelineError::Lost(_) = &error else { panic!("{error}") };
    assert!(error.bad().is_empty());
    let text = error.to_string();
    assert!(text.contains("1.tar?…: access is refused with 403: the signature may have expired"));
    assert!(!text.contains("abcdefgh"), "{text}");
}

/// What a loader over all samples ends with.
fn ended(set: &Arc<ShardSet>, on_bad_sample: OnBadSample) -> PipelineError {
    let order = Order::shuffled(set.len(), set.len(), 3).expect("an order");
    let train = LoaderOptions::train(Recipe::default(), order, 7, 1);
    let options = LoaderOptions {
        views: Views::Decode,
        workers: 2,
        on_bad_sample,
        bad_share_max: 1.0,
        bad_run_max: 1000,
        ..train
    };
    let mut loader = Loader::start(Arc::clone(set), options).expect("starts");
    loader.next().expect("a batch or an error").expect_err("an error")
}

#[test]
fn an_unreachable_store_is_lost_whatever_becomes_of_bad_samples() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    for policy in [OnBadSample::Fail, OnBadSample::Skip] {
        // Nobody listens any more when the shards are wanted.
        let cache = tempfile::tempdir_in(cache.path()).expect("a cache");
        let server = data.serve(|_| Answer::Well);
        let set = open(&server.url("set/{0,1}.tar"), &options(cache.path())).expect("opens");
        let set = Arc::new(set);
        for entry in std::fs::read_dir(cache.path()).expect("lists") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "tar") {
                std::fs::remove_file(path).expect("removes");
            }
        }
        drop(server);
        let error = ended(&set, policy);
        let PipelineError::Lost(_) = &error else { panic!("{error}") };
        let text = error.to_string();
        assert!(text.contains("after 3 attempts") && !text.contains("on_bad_sample"), "{text}");
    }
    // While it is opened as well: nobody there, no such name, errors for ever.
    let nobody = format!("http://127.0.0.1:{}/0.tar", closed_port());
    let errors = data.serve(|_| Answer::Status(503));
    for url in [nobody.as_str(), "http://host.invalid/0.tar", &errors.url("set/0.tar")] {
        let error = open(url, &options(cache.path())).expect_err(url);
        assert!(error.is_unreachable() && error.is_lost(), "{error}");
        let read = AtomicU64::new(0);
        let error = verify(&[url.to_owned()], &options(cache.path()), 1, &read).expect_err(url);
        assert!(error.is_unreachable(), "{error}");
    }
    // Nor is a shard a fault of the set's that could not be fetched when it was to be verified.
    let gone = data.serve(|request| match request.to {
        None if request.name.ends_with(".tar") => Answer::Status(500),
        _ => Answer::Well,
    });
    let bytes = data.bytes("0.tar");
    let text = detco_shards::format::index::IndexText::of(&bytes).expect("a tar").finish();
    data.put("0.idx", text.as_bytes());
    let fresh = tempfile::tempdir().expect("a cache");
    let read = AtomicU64::new(0);
    let lost = verify(&[gone.url("set/0.tar")], &options(fresh.path()), 1, &read);
    assert!(lost.expect_err("lost").is_unreachable());
}

/// A port that nobody listens on.
fn closed_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    listener.local_addr().expect("an address").port()
}

#[test]
fn versions_of_an_object_are_objects() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let (old, new) = (data.bytes("0.tar"), data.bytes("1.tar"));
    let locals = [data.local("0.tar"), data.local("1.tar")];
    data.put("manifest.json", b"{\"format\": 1}"); // of the newest version; none of a shard's
    let server = data.serve(move |request| match request.query.as_str() {
        "versionId=1" if request.to.is_none() => Answer::of("200 OK", "", &old),
        "versionId=2" if request.to.is_none() => Answer::of("200 OK", "", &new),
        "versionId=1" => Answer::of("200 OK", "ETag: \"same\"\r\n", &old),
        "versionId=2" => Answer::of("200 OK", "ETag: \"same\"\r\n", &new),
        _ => Answer::Well,
    });
    for (version, local) in (1..).zip(&locals) {
        let url = server.url(&format!("set/0.tar?versionId={version}"));
        let set = open(&url, &options(cache.path())).expect("opens");
        let (ours, theirs) = (set.sample(0).expect("remote"), local.sample(0).expect("local"));
        assert_eq!(ours.jpeg(), theirs.jpeg());
        assert_eq!(set.shards()[0].path(), Path::new(&url), "a version is no secret");
    }
    assert_eq!(cached(cache.path()), 2);
    assert!(server.log().iter().all(|request| request.name == "0.tar"), "nothing beside it");
}

#[test]
fn tokens_and_logins_are_sent_and_shown_nowhere() {
    let data = Bare::new();
    let server = data.serve(|request| match request.headers.get("authorization") {
        Some(sent) if sent == "Bearer t0ken-of-mine" => Answer::Well,
        Some(sent) if sent == "Basic bWU6c2VjcmV0" => Answer::Well, // me:secret
        Some(sent) => Answer::of("401 No", "X-Error-Code: GatedRepo\r\n", sent.as_bytes()),
        None => Answer::Status(401),
    });
    let home = tempfile::tempdir().expect("a home");
    std::fs::write(home.path().join(".netrc"), "machine 127.0.0.1 login me password secret\n")
        .expect("writes");
    let home = home.path().to_str().expect("a path");
    let endpoint = server.url("");
    let url = server.url("set/0.tar");
    let with_login = url.replace("http://", "http://me:secret@");
    for (variables, url) in [
        (&[("DETCO_HTTP_TOKEN", "t0ken-of-mine")][..], &url),
        (&[("DETCO_HTTP_AUTHORIZATION", "Bearer t0ken-of-mine")], &url),
        (&[("HF_TOKEN", "t0ken-of-mine"), ("HF_ENDPOINT", &endpoint)], &url),
        (&[("HOME", home)], &url),
        (&[], &with_login),
        (&[("DETCO_HTTP_TOKEN", "another-token")], &with_login),
    ] {
        let cache = tempfile::tempdir().expect("a cache");
        let options = with(options(cache.path()), variables);
        let set = open(url, &options).unwrap_or_else(|error| panic!("{variables:?}: {error}"));
        same(&set, &data.local("0.tar"));
        assert_eq!(set.shards()[0].path(), Path::new(&server.url("set/0.tar")));
        keeps_none_of(cache.path(), &["secret", "t0ken"]);
        assert!(!format!("{options:?} {set:?}").contains("t0ken"), "what is printed to debug");
    }
    let cache = tempfile::tempdir().expect("a cache");
    let wrong = url.replace("http://", "http://me:wrong-word@");
    for (variables, url, words) in [
        (&[][..], &url, &["refused with 401: credentials for HTTP", "DETCO_HTTP_TOKEN"][..]),
        (&[("HF_TOKEN", "t0ken-of-mine")], &url, &["refused with 401: credentials for HTTP"]),
        (&[("DETCO_HTTP_TOKEN", "wrong-word")], &url, &["401 (GatedRepo)"]),
        (&[], &wrong, &["user and password are those in the URL"]),
    ] {
        let error = open(url, &with(options(cache.path()), variables)).expect_err("refused");
        says(&error, words);
        says(&error, &[&server.url("set/0.tar")]);
        let all = format!("{error} {error:?}");
        assert!(!all.contains("wrong-word") && !all.contains("AWS_"), "{all}");
        // A folder that is refused is not said to have no manifest.
        let folder = url.replace("/0.tar", "");
        let error = open(&folder, &with(options(cache.path()), variables)).expect_err("refused");
        assert!(matches!(fault(&error), RemoteFault::Denied { .. }), "{error}");
    }
    // With a URL that is none, or braces that do not match, as well.
    for wrong in [
        "http://me:secret@:80/0.tar",
        "http://me:secret@127.0.0.1:1/{0..1.tar",
        "http://me:secret@127.0.0.1:1/*",
    ] {
        let error = open(wrong, &options(cache.path())).expect_err("no URL");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
    let mixed = [with_login, "here".to_owned()];
    for options in [None, Some(&options(cache.path()))] {
        let error = ShardSet::open_with(&mixed, options).expect_err("mixed, or no cache");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

#[test]
fn a_redirect_to_another_host_takes_no_credentials_along() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let there = data.serve(|_| Answer::Well);
    let target = there.url("set/");
    let here = data.serve(move |request| match request.name.as_str() {
        "loop.tar" => Answer::of("302 Found", "Location: loop.tar?sig=0123456789\r\n", b""),
        "away.tar" => Answer::of("302 Found", "Location: gopher://h/?sig=0123456789\r\n", b""),
        name => {
            let location = format!("Location: {target}{name}?sig=0123456789\r\n");
            Answer::of("307 Temporary Redirect", &location, b"moved")
        }
    });
    let options = with(options(cache.path()), &[("DETCO_HTTP_TOKEN", "t0ken")]);
    let url = here.url("set/{0,1}.tar");
    same(&open(&url, &options).expect("opens"), &data.local("{0,1}.tar"));
    let tokens = |server: &Server| {
        server.log().iter().filter(|request| request.headers.contains_key("authorization")).count()
    };
    assert_eq!((tokens(&here), tokens(&there)), (here.log().len(), 0));
    assert!(there.log().iter().all(|request| !request.headers.contains_key("referer")));
    assert!(tars(&there).iter().all(|request| request.query == "sig=0123456789"));
    for wrong in ["set/loop.tar", "set/away.tar"] {
        let error = open(&here.url(wrong), &options).expect_err(wrong);
        assert!(!format!("{error} {error:?}").contains("0123456789"), "{error:?}");
        assert!(!error.is_unreachable(), "{error}");
    }
}

/// The body in pieces, and no length.
fn chunked(headers: &str, body: &[u8]) -> Answer {
    let head = format!("HTTP/1.1 200 OK\r\n{headers}Transfer-Encoding: chunked\r\n\r\n");
    let mut bytes = head.into_bytes();
    for piece in body.chunks(1000) {
        bytes.extend(format!("{:x}\r\n", piece.len()).bytes());
        bytes.extend(piece);
        bytes.extend(b"\r\n");
    }
    bytes.extend(b"0\r\n\r\n");
    Answer::Raw(bytes)
}

#[test]
fn a_size_that_no_server_says_is_counted() {
    let data = Bare::new();
    let bytes = data.bytes("0.tar");
    for (headers, again) in [("ETag: \"a\"\r\n", 1), ("Last-Modified: yesterday\r\n", 1), ("", 2)] {
        let (cache, bytes) = (tempfile::tempdir().expect("a cache"), bytes.clone());
        let server = data.serve(move |request| match request.name.as_str() {
            "0.tar" => chunked(headers, &bytes),
            _ => Answer::Status(404),
        });
        let url = server.url("set/0.tar");
        same(&open(&url, &options(cache.path())).expect("opens"), &data.local("0.tar"));
        // With a validator the cache knows it again at a look; without, all of it is looked at.
        let before = tars(&server).len();
        same(&open(&url, &options(cache.path())).expect("opens"), &data.local("0.tar"));
        assert_eq!(tars(&server).len() - before, again, "{headers}");
        assert_eq!(cached(cache.path()), 1);
    }
    // One that ends when the connection does, after a first time that ended early.
    let (cache, whole) = (tempfile::tempdir().expect("a cache"), bytes.clone());
    let server = data.serve(move |request| match (request.name.as_str(), request.before) {
        ("0.tar", 2) => Answer::Raw([b"HTTP/1.0 200 OK\r\n\r\n", &whole[..3000]].concat()),
        ("0.tar", _) => Answer::Raw([b"HTTP/1.0 200 OK\r\n\r\n", whole.as_slice()].concat()),
        _ => Answer::Status(404),
    });
    let set = open(&server.url("set/0.tar"), &options(cache.path())).expect("opens");
    same(&set, &data.local("0.tar"));
    // Another object at each look.
    let cache = tempfile::tempdir().expect("a cache");
    let server = data.serve(move |request| match request.name.as_str() {
        "0.tar" => {
            let mut bytes = bytes.clone();
            let middle = bytes.len() / 2;
            bytes[middle] ^= request.before as u8;
            chunked("", &bytes)
        }
        _ => Answer::Status(404),
    });
    let error = open(&server.url("set/0.tar"), &options(cache.path())).expect_err("changes");
    assert!(matches!(fault(&error), RemoteFault::Replaced), "{error}");
    assert_eq!(cached(cache.path()), 0);
}

/// An answer of the bytes from `from` to `to`.
fn part(bytes: &[u8], from: usize, to: usize, headers: &str) -> Answer {
    let range = format!("{headers}Content-Range: bytes {from}-{}/{}\r\n", to - 1, bytes.len());
    Answer::of("206 Partial Content", &range, &bytes[from..to])
}

/// The start of an answer, after which the connection ends.
fn cut(answer: Answer, bytes: usize) -> Answer {
    match answer {
        Answer::Raw(mut all) => {
            all.truncate(bytes);
            Answer::Raw(all)
        }
        other => other,
    }
}

#[test]
fn ranges_that_are_ignored_moved_bounded_or_refused_lead_to_the_same_bytes() {
    let data = Bare::new();
    let bytes = data.bytes("0.tar");
    type How = fn(&[u8], &Request) -> Answer;
    let whole: How = |bytes, _| Answer::of("200 OK", "ETag: W/\"weak\"\r\n", bytes);
    let without: How = |bytes, _| Answer::of("200 OK", "", bytes);
    let earlier: How = |bytes, request| {
        let from = request.from as usize;
        part(bytes, from - from.min(700), bytes.len(), "ETag: W/\"weak\"\r\n")
    };
    let bounded: How = |bytes, request| {
        let from = request.from as usize;
        part(bytes, from, bytes.len().min(from + 1500), "ETag: W/\"weak\"\r\n")
    };
    let refused: How = |bytes, request| match request.from {
        0 => Answer::of("200 OK", "", bytes),
        _ => Answer::of("416 Range Not Satisfiable", "", b""),
    };
    let nameless: How = |bytes, request| match request.from {
        0 => Answer::of("200 OK", "", bytes),
        from => Answer::of("206 Partial Content", "", &bytes[from as usize..]),
    };
    let later: How = |bytes, request| match request.from {
        0 => Answer::of("200 OK", "", bytes),
        from => part(bytes, from as usize + 512, bytes.len(), ""),
    };
    for (number, how) in
        [whole, without, earlier, bounded, refused, nameless, later].into_iter().enumerate()
    {
        let (cache, bytes) = (tempfile::tempdir().expect("a cache"), bytes.clone());
        let server = data.serve(move |request| match request.name.as_str() {
            // The first time only a part comes of it.
            "0.tar" if request.to.is_none() && request.from == 0 && request.before < 3 => {
                cut(Answer::of("200 OK", "ETag: W/\"weak\"\r\n", &bytes), 4000)
            }
            "0.tar" if request.to.is_some() => Answer::of("200 OK", "", &bytes),
            "0.tar" => how(&bytes, request),
            _ => Answer::Status(404),
        });
        let set = open(&server.url("set/0.tar"), &options(cache.path()));
        let set = set.unwrap_or_else(|error| panic!("{number}: {error}"));
        same(&set, &data.local("0.tar"));
    }
}

#[test]
fn an_object_that_changes_between_two_ranges_is_noticed() {
    let data = Bare::new();
    let bytes = data.bytes("0.tar");
    let date = |day: u32| format!("Last-Modified: Tue, {day:02} Jan 1980 00:00:00 GMT\r\n");
    for (before, after, longer) in [
        ("ETag: \"a\"\r\n".to_owned(), "ETag: \"b\"\r\n".to_owned(), 0),
        ("ETag: W/\"a\"\r\n".to_owned(), "ETag: W/\"b\"\r\n".to_owned(), 0),
        (date(1), date(2), 0),
        (String::new(), String::new(), 512),
    ] {
        let (cache, bytes) = (tempfile::tempdir().expect("a cache"), bytes.clone());
        let server = data.serve(move |request| match (request.name.as_str(), request.to) {
            ("0.tar", Some(_)) => Answer::of("200 OK", &before, &bytes),
            ("0.tar", None) if request.from == 0 => {
                cut(Answer::of("200 OK", &before, &bytes), 4000)
            }
            ("0.tar", None) => {
                let mut bytes = bytes.clone();
                bytes.resize(bytes.len() + longer, 0);
                part(&bytes, request.from as usize, bytes.len(), &after)
            }
            _ => Answer::Status(404),
        });
        let error = open(&server.url("set/0.tar"), &options(cache.path())).expect_err("changes");
        assert!(matches!(fault(&error), RemoteFault::Replaced), "{error}");
        let left = std::fs::read_dir(cache.path()).expect("lists").count();
        assert_eq!(left, 1, "the file of locks alone");
    }
}

#[test]
fn a_server_that_compresses_is_understood() {
    let data = Bare::new();
    let packed = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).expect("writes");
        gzip.finish().expect("ends")
    };
    let bytes = packed(&data.bytes("0.tar"));
    let index = detco_shards::format::index::IndexText::of(&data.bytes("1.tar")).expect("a tar");
    let (one, index) = (data.bytes("1.tar"), packed(index.finish().as_bytes()));
    let headers = "Content-Encoding: gzip\r\nETag: \"a-gzip\"\r\n";
    let cache = tempfile::tempdir().expect("a cache");
    let server = data.serve(move |request| match request.name.as_str() {
        _ if request.headers["accept-encoding"] != "identity" => Answer::Status(500),
        "0.tar" if request.to.is_some() => part(&bytes, 0, 512, headers),
        "0.tar" if request.before == 2 => cut(Answer::of("200 OK", headers, &bytes), 3000),
        "0.tar" => Answer::of("200 OK", headers, &bytes),
        "1.tar" => Answer::of("200 OK", "ETag: \"b\"\r\n", &one),
        "1.idx" => Answer::of("200 OK", headers, &index),
        "2.tar" => Answer::of("200 OK", "Content-Encoding: br\r\n", &one),
        _ => Answer::Status(404),
    });
    let set = open(&server.url("set/{0,1}.tar"), &options(cache.path())).expect("opens");
    same(&set, &data.local("{0,1}.tar"));
    let error = open(&server.url("set/2.tar"), &options(cache.path())).expect_err("brotli");
    says(&error, &["compressed (Content-Encoding: br)"]);
}

/// What was told while sets were opened, by URL: notices know no test.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn told(server: &Server) -> Vec<String> {
    let told = TOLD.lock().expect("no panic");
    told.iter().filter(|text| text.contains(&server.url(""))).cloned().collect()
}

fn telling(options: RemoteOptions) -> RemoteOptions {
    let notice: fn(&str) = |text| TOLD.lock().expect("no panic").push(text.to_owned());
    RemoteOptions { notice: Some(notice), ..options }
}

#[test]
fn a_page_in_place_of_a_manifest_or_an_index_is_none() {
    const PAGE: &[u8] = b"<!doctype html><p>my site";
    let data = Bare::new();
    for (page, kind) in [
        (PAGE, "text/html"),
        (b"v1.1 6\njpg 512 900 cls 2048 1\n", "text/plain"), // of an older DALI
        (b"0\t0\n1\t900\n", "text/plain"),                   // MXNet's
        (b"", "text/plain"),
        (b"{\"shards\": [], \"total\": 6}", "application/json"), // another program's
        (b"\x00\x01\x02", "application/octet-stream"),
    ] {
        let cache = tempfile::tempdir().expect("a cache");
        let server = data.serve(move |request| match request.name.ends_with(".tar") {
            true => Answer::Well,
            false => Answer::of("200 OK", &format!("Content-Type: {kind}\r\n"), page),
        });
        let set = open(&server.url("set/{0,1}.tar"), &telling(options(cache.path())));
        let set = set.unwrap_or_else(|error| panic!("{page:?}: {error}"));
        same(&set, &data.local("{0,1}.tar"));
        let told = told(&server);
        let of = |name: &str| told.iter().filter(|text| text.contains(name)).count();
        assert_eq!((of("manifest.json: no manifest"), of(".idx: no index")), (1, 1), "{told:?}");
    }
    // A manifest of this program's that cannot be read is one.
    let cache = tempfile::tempdir().expect("a cache");
    for (text, word) in [(&b"{\n  \"format\": 2}"[..], "version 2"), (b"{\"format\": 1", "EOF")] {
        let server = data.serve(move |request| match request.name.as_str() {
            "manifest.json" => Answer::of("200 OK", "", text),
            _ => Answer::Well,
        });
        let error = open(&server.url("set/0.tar"), &options(cache.path())).expect_err("broken");
        says(&error, &["manifest.json", word]);
    }
}

#[test]
fn a_page_in_place_of_a_shard_is_told_as_one_and_not_kept() {
    let data = Bare::new();
    for (page, words) in [
        (&b"<!doctype html><p>Log in"[..], "a web page where a shard was expected"),
        (b"{\"error\": \"quota\"}", "a JSON text where a shard was expected"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML text"),
        (b"Service unavailable", "a text where"),
    ] {
        let cache = tempfile::tempdir().expect("a cache");
        let server = data.serve(move |_| Answer::of("200 OK", "Content-Type: x/y\r\n", page));
        for url in [server.url("set/0.tar"), server.url("set/nope.tar?download=true")] {
            let error = open(&url, &options(cache.path())).expect_err("a page");
            says(&error, &[words, &url]);
            assert!(!error.is_unreachable(), "who opens may have misspelt it");
        }
        let left = std::fs::read_dir(cache.path()).expect("lists").count();
        assert_eq!(left, 1, "the file of locks alone");
    }
    // A portal that comes between: the size was right, what came is not.
    let cache = tempfile::tempdir().expect("a cache");
    let page = [b"<html>".as_slice(), &vec![b' '; data.bytes("0.tar").len() - 6]].concat();
    let server = data.serve(move |request| match request.to {
        None if request.name == "0.tar" => Answer::of("200 OK", "", &page),
        _ => Answer::Well,
    });
    let error = open(&server.url("set/0.tar"), &options(cache.path())).expect_err("a page");
    assert!(matches!(fault(&error), RemoteFault::Page { .. }), "{error}");
    assert_eq!(cached(cache.path()), 0);
    // A folder of pages has no shards.
    let server = data.serve(|_| Answer::of("200 OK", "", b"<html>"));
    let error = open(&server.url("set"), &options(cache.path())).expect_err("no list");
    assert!(matches!(fault(&error), RemoteFault::NotListed), "{error}");
}

#[test]
fn member_names_may_hold_spaces_and_any_letter() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let odd = |number| format!("235342 Track 2%20 (Größe {number})\n");
    data.put("my set+1.tar", &tar(0, odd));
    let server = data.serve(|_| Answer::Well);
    let local = data.local("my set+1.tar");
    for url in ["set/my%20set+1.tar", "set/my set+1.tar", "set/my%20set%2B1.tar"] {
        for _ in 0..2 {
            same(&open(&server.url(url), &options(cache.path())).expect(url), &local);
        }
    }
    assert_eq!(local.sample(0).expect("a sample").key, odd(0));
    // What is wrong here is wrong there, in the same words.
    let mut bad = tar(0, |number| format!("{number:04}"));
    for name in [b"0000.jpg", b"0000.cls"] {
        let at = bad.windows(8).position(|bytes| bytes == name).expect("a name");
        let sum = |block: &[u8]| -> u64 {
            let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
            let stored: u64 = block[148..156].iter().map(|byte| u64::from(*byte)).sum();
            sum - stored + 8 * 32
        };
        bad[at] = 0xff;
        let checksum = format!("{:06o}\0 ", sum(&bad[at..at + 512]));
        bad[at + 148..at + 156].copy_from_slice(checksum.as_bytes());
    }
    data.put("bad.tar", &bad);
    let here = ShardSet::open(&[data.path("bad.tar").display().to_string()]).map(drop);
    for _ in 0..2 {
        let there = open(&server.url("set/bad.tar"), &options(cache.path()));
        let there = there.and_then(|set| set.first_bad().map_or(Ok(()), Err));
        let without = |result: &Result<(), ShardError>, place: &str| match result {
            Ok(()) => String::new(),
            Err(error) => error.to_string().replace(place, ""),
        };
        let folder = data.path("").display().to_string();
        assert_eq!(without(&there, &server.url("set/")), without(&here, &folder));
    }
}

#[test]
fn small_files_are_bounded() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let long = [b"v1.2 6\n".as_slice(), &vec![b'a'; data.bytes("0.tar").len() + 1]].concat();
    let server = data.serve(move |request| match request.name.as_str() {
        "0.idx" => chunked("", &long),
        _ => Answer::Well,
    });
    let error = open(&server.url("set/0.tar"), &options(cache.path())).expect_err("too long");
    assert!(matches!(fault(&error), RemoteFault::TooLarge { .. }), "{error}");
    says(&error, &["0.idx", &data.bytes("0.tar").len().to_string()]);
}

#[test]
fn urls_are_written_in_many_ways() {
    let (data, cache) = (Bare::new(), tempfile::tempdir().expect("a cache"));
    let bytes = data.bytes("0.tar");
    let server = data.serve(move |request| match request.name.as_str() {
        "download" if request.query == "id=0&token=abcdef" => Answer::of("200 OK", "", &bytes),
        "download" => Answer::Status(404),
        _ => Answer::Well,
    });
    let port = server.port();
    let local = data.local("0.tar");
    for url in [
        format!("HTTP://127.0.0.1:{port}/set/0.tar"),
        format!("http://127.0.0.1:{port}/set/./x/../0.tar"),
        format!("http://127.0.0.1:{port}/set/%30.tar"),
        format!("http://localhost:{port}/set/0.tar?download=true"),
        format!("http://[::ffff:127.0.0.1]:{port}/set/0.tar"),
    ] {
        same(&open(&url, &options(cache.path())).expect(&url), &local);
    }
    let twice = [server.url("set/0.tar"), format!("HTTP://127.0.0.1:{port}/set/%30.tar")];
    // `%30` is another path by the letter, and the same file on this server: nobody can know.
    let set = ShardSet::open_with(&twice, Some(&options(cache.path()))).expect("opens");
    assert_eq!(set.len(), 2 * u64::from(SAMPLES));
    let signed = [server.url("set/0.tar?sig=1"), server.url("set/0.tar?sig=2")];
    let error = ShardSet::open_with(&signed, Some(&options(cache.path()))).expect_err("twice");
    says(&error, &["is named twice"]);
    // A server that gives files no names.
    let set = open(&server.url("download?id=0&token=abcdef"), &options(cache.path()));
    let set = set.expect("a tar by its first bytes");
    assert_eq!(set.shards()[0].path(), Path::new(&server.url("download?…")));
    assert_eq!(set.sample(0).expect("remote").jpeg(), local.sample(0).expect("local").jpeg());
    let fail = |url: &str| open(url, &options(cache.path())).expect_err(url);
    says(&fail("http://h/a.tar?…"), &["name the data again"]);
    says(&fail("hf://datasets/a/0.tar"), &["shards are fetched from s3://", "hf://"]);
}
