//! Shards behind URLs: real servers on loopback, everything that can go wrong on the way, and the
//! cache that all processes of a machine share.

mod common;
#[expect(dead_code, reason = "answers word for word are http.rs's")]
mod remote_server;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{jpeg, python, run_python};
use detco_shards::cache::Cache;
use detco_shards::format::{RemoteFault, ShardError, SpecFault};
use detco_shards::order::{Cursor, Order};
use detco_shards::pack::{self, Job, Options, Progress, ShardSize};
use detco_shards::pipeline::{Loader, LoaderOptions, Views};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::{Patience, RemoteOptions, verify};
use detco_shards::views::Recipe;
use remote_server::{Answer, HANG, Request, Server};

/// Samples of the data set, and of each of its shards.
const SAMPLES: u64 = 48;
const EACH: u64 = 4;

/// A packed data set in a folder `set` of a folder that a server may serve.
struct Data {
    root: tempfile::TempDir,
}

impl Data {
    fn new() -> Data {
        Data::of(|number| [64 + number, 48])
    }

    /// Images of these widths and heights.
    fn of(size: impl Fn(u32) -> [u32; 2]) -> Data {
        let root = tempfile::tempdir().expect("a folder");
        let source = root.path().join("images");
        for number in 0..SAMPLES as u32 {
            let class = source.join(format!("class-{}", number % 3));
            std::fs::create_dir_all(&class).expect("creates");
            let [width, height] = size(number);
            let bytes = jpeg(number, width, height);
            std::fs::write(class.join(format!("{number:03}.jpg")), bytes).expect("writes");
        }
        let job = Job {
            source,
            out: root.path().join("set"),
            options: Options { shard_size: ShardSize::Samples(EACH), ..Options::default() },
            part: detco_shards::format::manifest::Part::WHOLE,
            workers: 1,
            resume: false,
        };
        pack::run(&job, &Progress::default()).expect("packs");
        Data { root }
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join("set")
    }

    fn local(&self) -> ShardSet {
        ShardSet::open(&[self.folder().display().to_string()]).expect("opens")
    }

    fn largest(&self) -> u64 {
        self.local().shards().iter().map(|shard| shard.bytes()).max().expect("shards")
    }

    fn serve(&self, rule: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Server {
        Server::start(self.root.path(), rule)
    }
}

/// Few attempts, so that tests are quick, and all the time that a slow machine may need: nothing that is
/// awaited here may end by the clock.
fn options(cache: &Path) -> RemoteOptions {
    let patience =
        Patience { attempts: 4, pause: Duration::from_millis(5), stall: HANG, room: HANG };
    RemoteOptions { patience, ..RemoteOptions::new(cache, 1 << 30) }
}

/// With a cache of so many bytes, and soon told that it has no room: for what never gets any.
fn told_soon(cache: &Path, cache_bytes: u64) -> RemoteOptions {
    let all = options(cache);
    let patience = Patience { room: Duration::from_millis(700), ..all.patience };
    RemoteOptions { cache_bytes, patience, ..all }
}

fn open(url: &str, options: &RemoteOptions) -> Result<ShardSet, ShardError> {
    ShardSet::open_with(&[url.to_owned()], Some(options))
}

/// Polls until something has happened.
#[track_caller]
fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let since = Instant::now();
    while !happened() {
        assert!(since.elapsed() < HANG, "{what}: not in five minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Everything that can be read of a set is as in the local one.
fn same(remote: &ShardSet, local: &ShardSet) {
    assert_eq!((remote.len(), remote.fingerprint()), (local.len(), local.fingerprint()));
    assert_eq!(remote.classes(), local.classes());
    for id in 0..local.len() {
        let (ours, theirs) = (remote.sample(id).expect("remote"), local.sample(id).expect("local"));
        assert_eq!((ours.key, ours.offset), (theirs.key, theirs.offset));
        assert_eq!(ours.class().expect("a class"), theirs.class().expect("a class"));
        assert_eq!(ours.jpeg(), theirs.jpeg());
        // Nothing was copied: the slice lies in the map of the cached file, at its offset.
        let (map, jpeg) = (ours.map_range(), ours.jpeg().as_ptr_range());
        assert!(map.start <= jpeg.start && jpeg.end <= map.end);
        assert_eq!(jpeg.start.addr() - map.start.addr(), ours.offset as usize);
    }
}

fn fault(error: ShardError) -> (String, RemoteFault) {
    match error {
        ShardError::Shared(shared) => {
            fault(Arc::into_inner(shared).unwrap_or_else(|| panic!("held elsewhere")))
        }
        ShardError::Remote { url, fault } => (url, *fault),
        other => panic!("{other}"),
    }
}

/// The text of an error, for what only lends it.
fn says(error: &ShardError, words: &[&str]) {
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}: {words:?}");
}

#[test]
fn a_set_behind_http_is_the_local_set() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    let set = open(&server.url("set"), &options(cache.path())).expect("opens");
    let tars = |server: &Server| {
        server.log().iter().filter(|request| request.name.ends_with(".tar")).count()
    };
    assert_eq!(tars(&server), 0, "opening fetches no shard");
    same(&set, &data.local());
    let fetched = set.fetched().expect("a remote set");
    assert_eq!((fetched.shards, fetched.failures), (SAMPLES / EACH, 0));
    assert_eq!(fetched.bytes, set.shards().iter().map(|shard| shard.bytes()).sum::<u64>());
    assert!(fetched.waits.count() > 0);
    drop(set);

    // A second time, also by braces: shards and indexes are there, the manifest alone is asked for.
    let before = server.log().len();
    let spec = server.url("set/{000000..000011}.tar");
    let set = open(&spec, &options(cache.path())).expect("opens");
    same(&set, &data.local());
    let names: Vec<String> = server.log()[before..].iter().map(|r| r.name.clone()).collect();
    assert_eq!(names, ["manifest.json"]);
    assert_eq!(set.shards()[3].path(), Path::new(&server.url("set/000003.tar")));
    assert_eq!(set.manifests().len(), 1);
}

#[test]
fn what_cannot_be_named_is_explained() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match request.name.as_str() {
        "000007.tar" => Answer::Status(403),
        _ => Answer::Well,
    });
    let fail = |url: &str| open(url, &options(cache.path())).expect_err(url);
    assert!(matches!(fault(fail(&server.url("images"))).1, RemoteFault::NotListed));
    let braces = server.url("set/{000000..000012}.tar");
    let unlisted = fail(&braces);
    assert!(matches!(unlisted, ShardError::Spec { fault: SpecFault::Unlisted { .. }, .. }));
    says(&unlisted, &["000012.tar"]);
    assert!(matches!(fault(fail("http://127.0.0.1/a.tar#1")).1, RemoteFault::Url { .. }));
    assert!(matches!(fault(fail("s3://bucket/a.tar?key=1")).1, RemoteFault::Url { .. }));
    says(&fail("file:///data/a.tar"), &["name its path alone"]);
    says(&fail(&server.url("set/*.tar")), &["braces"]);
    says(&fail("gopher://there/a.tar"), &["gopher"]);
    let missing = ShardSet::open(std::slice::from_ref(&braces)).expect_err("no cache");
    assert!(matches!(fault(missing).1, RemoteFault::NoCache));
    let mixed = [braces, data.folder().display().to_string()];
    let mixed = ShardSet::open_with(&mixed, Some(&options(cache.path()))).expect_err("mixed");
    assert!(matches!(mixed, ShardError::Spec { fault: SpecFault::Mixed, .. }));
    let twice = [server.url("set/000000.tar"), server.url("set/00000{0,1}.tar")];
    let twice = ShardSet::open_with(&twice, Some(&options(cache.path()))).expect_err("twice");
    assert!(matches!(twice, ShardError::Spec { fault: SpecFault::Twice { .. }, .. }));

    let set = open(&server.url("set"), &options(cache.path())).expect("opens");
    let error = set.sample(7 * EACH).expect_err("refused");
    says(&error, &[&server.url("set/000007.tar"), "access is refused"]);
    assert!(set.sample(8 * EACH).is_ok(), "the others are there");
}

#[test]
fn a_server_that_answers_nothing_but_errors_is_given_up_with_a_count() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match request.name.ends_with(".tar") {
        true => Answer::Status(503),
        false => Answer::Well,
    });
    let set = open(&server.url("set"), &options(cache.path())).expect("opens");
    let error = set.sample(0).expect_err("gives up");
    says(&error, &[&server.url("set/000000.tar"), "at byte 0, after 4 attempts", "503"]);
    assert!(set.sample(1).is_err(), "told again without asking again");
    let asked = server.log().iter().filter(|request| request.name == "000000.tar").count();
    assert_eq!(asked, 4);
    assert_eq!(set.fetched().expect("remote").failures, 4);
}

/// What would be read in its place would depend on the network: no policy for bad samples speaks of it. Bytes
/// that came and are not the manifest's are damage, as in a file.
#[test]
fn a_store_that_is_lost_is_no_bad_sample_and_damage_is() {
    use detco_shards::pipeline::{OnBadSample, PipelineError};

    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let end = |answer: fn() -> Answer, on_bad_sample| {
        let server = data.serve(move |request| match request.name.as_str() {
            "000003.tar" => answer(),
            _ => Answer::Well,
        });
        let set = open(
            &server.url("set"),
            &options(&cache.path().join(server.url("")[7..].replace('/', "_"))),
        );
        let set = Arc::new(set.expect("opens"));
        let order = Order::shuffled(set.len(), EACH, 3).expect("an order");
        let options = LoaderOptions {
            views: Views::Decode,
            workers: 2,
            on_bad_sample,
            bad_share_max: 1.0,
            ..LoaderOptions::train(Recipe::default(), order, 7, 1)
        };
        Loader::start(set, options).expect("starts").find_map(Result::err)
    };
    let lost: [fn() -> Answer; 2] = [|| Answer::Status(503), || Answer::Status(403)];
    for answer in lost {
        for policy in [OnBadSample::Fail, OnBadSample::Skip] {
            let error = end(answer, policy).expect("lost");
            assert!(matches!(error, PipelineError::Lost(_)), "{policy:?}: {error}");
            let said = error.to_string();
            assert!(said.contains("000003.tar") && said.contains("cannot be had"), "{said}");
            assert!(error.bad().is_empty(), "not to be listed: {said}");
        }
    }
    let error = end(|| Answer::Corrupt, OnBadSample::Fail).expect("damage");
    assert!(matches!(error, PipelineError::Bad(_)), "{error}");
    assert!(end(|| Answer::Corrupt, OnBadSample::Skip).is_none(), "its samples are replaced");
}

/// Each shard meets everything that passes: a 500, a slow line, a line cut twice.
#[test]
fn what_passes_is_tried_again_from_where_it_ended() {
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match (request.name.ends_with(".tar"), request.before) {
        (true, 0) => Answer::DropAfter(3000),
        (true, 1) => Answer::Status(500),
        (true, 2) => match request.name.as_str() {
            "000005.tar" => Answer::Slow(2000),
            _ => Answer::DropAfter(1000),
        },
        (false, 0) => Answer::Status(500),
        _ => Answer::Well,
    });
    let notice: fn(&str) = |text| TOLD.lock().expect("no panic").push(text.to_owned());
    let telling = RemoteOptions { notice: Some(notice), ..options(cache.path()) };
    let set = open(&server.url("set"), &telling).expect("opens");
    same(&set, &data.local());
    // Of twelve shards that failed three times each, a person is told once.
    let told = TOLD.lock().expect("no panic");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("/set/") && told[0].contains("attempts failed, trying again: "));
    let fetched = set.fetched().expect("remote");
    assert_eq!(fetched.bytes, set.shards().iter().map(|shard| shard.bytes()).sum::<u64>());
    let log = server.log();
    let from: Vec<u64> =
        log.iter().filter(|request| request.name == "000000.tar").map(|r| r.from).collect();
    assert_eq!(from, [0, 3000, 3000, 4000]);
}

/// However long a server would go on saying nothing, it is left and asked again, for what has not come.
#[test]
fn a_silent_server_is_left_and_asked_again() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match (request.name.as_str(), request.before) {
        ("000004.tar", 0) => Answer::Silent(0),
        ("000004.tar", 1) => Answer::Silent(1000),
        _ => Answer::Well,
    });
    // A machine that pauses may take any other server for a silent one: it is asked as often as it takes.
    let all = options(cache.path());
    let patience = Patience { attempts: 1000, stall: Duration::from_secs(1), ..all.patience };
    let set = open(&server.url("set"), &RemoteOptions { patience, ..all }).expect("opens");
    same(&set, &data.local());
    let log = server.log();
    let from: Vec<u64> =
        log.iter().filter(|request| request.name == "000004.tar").map(|r| r.from).collect();
    assert!(matches!(from[..], [0, 0, 0..=1000, ..]), "{from:?}");
    assert!(set.fetched().expect("remote").failures >= 2);
}

#[test]
fn bytes_that_are_not_the_manifests_are_refused_and_not_kept() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match (request.name.as_str(), request.before) {
        ("000002.tar", _) | ("000003.tar", 0) => Answer::Corrupt,
        ("000004.tar", _) => Answer::Short(2048),
        ("000005.idx", _) => Answer::Well,
        _ => Answer::Well,
    });
    let set = open(&server.url("set"), &options(cache.path())).expect("opens");
    let error = set.sample(2 * EACH).expect_err("corrupt");
    says(&error, &["000002.tar", "SHA-256", "fetched 2 times"]);
    assert!(set.sample(3 * EACH).is_ok(), "corrupt once: the line, not the object");
    let error = set.sample(4 * EACH).expect_err("short");
    says(&error, &["000004.tar", "2048 bytes", "recorded"]);
    let kept = Cache::open(cache.path(), 1 << 30).expect("opens").usage().expect("lists");
    assert_eq!((kept.files, kept.parts), (12 + 1, 0), "indexes and one shard");

    let read = AtomicU64::new(0);
    let report = verify(&[server.url("set")], &options(cache.path()), 2, &read).expect("opens");
    let files: Vec<String> = report.faults.iter().map(|f| f.file.display().to_string()).collect();
    assert_eq!(files, [server.url("set/000002.tar"), server.url("set/000004.tar")]);
    assert_eq!((report.shards, report.samples), (12, 10 * EACH));
    assert_eq!(report.checked, 10 * EACH * 2);

    let cache = tempfile::tempdir().expect("a cache");
    let server = data.serve(|request| match request.name.as_str() {
        "000005.idx" => Answer::Corrupt,
        _ => Answer::Well,
    });
    let error = open(&server.url("set"), &options(cache.path())).expect_err("a corrupt index");
    assert!(matches!(fault(error).1, RemoteFault::IndexDigest { .. }));
}

#[test]
fn shards_without_manifest_or_index_are_fetched_once_and_counted() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    std::fs::remove_file(data.folder().join("manifest.json")).expect("removes");
    for shard in 0..12 {
        let index = data.folder().join(format!("{shard:06}.idx"));
        std::fs::remove_file(index).expect("removes");
    }
    let server = data.serve(|_| Answer::Well);
    let url = server.url("set/{000000..000011}.tar");
    // Room for three shards at a time, and all indexes. Twelve at once wait for that room.
    let three = RemoteOptions { cache_bytes: room(&data, 3), ..options(cache.path()) };
    let set = open(&url, &three).expect("opens");
    same(&set, &data.local());
    drop(set);
    let before = server.log().len();
    let set = open(&url, &three).expect("opens");
    let asked: Vec<Request> = server.log()[before..].to_vec();
    assert!(
        asked.iter().all(|request| request.to == Some(511) || request.name == "manifest.json"),
        "of shards their first block, which tells the size"
    );
    assert_eq!(set.len(), SAMPLES);
}

/// The orders of a training run, whatever the cache holds.
fn batches(set: &Arc<ShardSet>, order: &Order, rank: (u32, u32), start: Cursor) -> Vec<Vec<u64>> {
    let options = LoaderOptions {
        views: Views::Decode,
        rank,
        start,
        workers: 2,
        ..LoaderOptions::train(Recipe::default(), order.clone(), 7, 2)
    };
    let loader = Loader::start(Arc::clone(set), options).expect("starts");
    loader.map(|batch| batch.expect("a batch").samples.clone()).collect()
}

#[test]
fn a_window_that_fits_the_cache_trains_within_its_bound() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    // Two windows of two shards.
    let bound = room(&data, 4);
    let small = RemoteOptions { cache_bytes: bound, ..options(cache.path()) };
    let set = Arc::new(open(&server.url("set"), &small).expect("opens"));
    let each: Vec<u64> = set.shards().iter().map(|shard| shard.samples()).collect();
    let order = Order::windowed(&each, 2, 5, 7).expect("an order");
    let watched = Cache::open(cache.path(), bound).expect("opens");
    let most = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let all = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let used = watched.usage().expect("lists").bytes;
                most.fetch_max(used, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let all = batches(&set, &order, (0, 1), Cursor::default());
        over.store(true, Ordering::Relaxed);
        all
    });
    assert_eq!(all.len() as u64, 2 * order.steps_per_epoch());
    for (number, batch) in all.iter().enumerate() {
        let steps = order.steps_per_epoch();
        let cursor = Cursor { epoch: number as u32 / steps as u32, step: number as u64 % steps };
        let expected: Vec<u64> = (0..5).map(|slot| order.sample(cursor, slot)).collect();
        assert_eq!(*batch, expected, "{cursor:?}");
    }
    let most = most.into_inner();
    assert!(most <= bound && most > 2 * data.largest(), "{most} of {bound}");
    // About once an epoch each. One that came ahead may have to go again for one that is needed
    // sooner, while the window before is still being read; a cache this small has that often.
    let fetched = set.fetched().expect("remote").shards;
    assert!((12..=36).contains(&fetched), "{fetched}");

    // A restart in the middle, on three ranks that share the cache, goes on as if nothing were.
    let start = Cursor { epoch: 1, step: 4 };
    let ranks: Vec<Vec<Vec<u64>>> = std::thread::scope(|scope| {
        let run = |rank| {
            let (server, order) = (&server, &order);
            let small = &small;
            scope.spawn(move || {
                let set = Arc::new(open(&server.url("set"), small).expect("opens"));
                batches(&set, order, (rank, 3), start)
            })
        };
        let ranks: Vec<_> = (0..3).map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    });
    let skipped = (order.steps_per_epoch() + 4) as usize;
    for (step, whole) in all[skipped..].iter().enumerate() {
        let parts: Vec<u64> = ranks.iter().flat_map(|rank| rank[step].clone()).collect();
        assert_eq!(parts, *whole);
    }
}

#[test]
fn a_cache_that_is_too_small_is_refused_and_one_in_use_is_named() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    let with = |bytes| RemoteOptions { cache_bytes: bytes, ..options(cache.path()) };
    let error = open(&server.url("set"), &with(data.largest() - 1)).expect_err("too small");
    assert!(matches!(fault(error).1, RemoteFault::NoRoom { kept: 0, .. }));

    let two = told_soon(cache.path(), room(&data, 2));
    let set = open(&server.url("set"), &two).expect("opens");
    let (one, other) = (set.sample(0).expect("room"), set.sample(EACH).expect("room"));
    let another = open(&server.url("set"), &two).expect("opens");
    let error = another.sample(5 * EACH).expect_err("both are in use");
    says(&error, &["000005.tar", "no room", "in use, by this or other processes"]);
    let before = one.jpeg().to_vec();
    drop(other);
    // It is unmapped when nobody has asked for it for a while.
    until("one may go", || another.sample(6 * EACH).is_ok());
    until("another may go", || set.sample(EACH).is_ok());
    assert_eq!(one.jpeg(), before);
    // Somebody empties the cache by hand: what is mapped stays readable.
    for entry in std::fs::read_dir(cache.path()).expect("lists") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("removes");
    }
    assert_eq!(one.jpeg(), before);
    set.check_file(&one).expect("unchanged");
}

/// Where an evaluation has the classes from.
#[derive(Clone, Copy)]
enum Classes {
    /// The batch: they were read with the samples.
    Batch,
    /// The shards, once more, when a batch has come.
    Shards,
}

/// An evaluation of so many samples, spaced over the set, in batches of so many.
fn evaluated(
    set: &Arc<ShardSet>,
    (most, batch): (u64, u64),
    classes: Classes,
) -> Result<Vec<u64>, String> {
    let order = Order::spaced(set.len(), most, batch).expect("an order");
    let options =
        LoaderOptions { workers: 2, ..LoaderOptions::evaluate(Recipe::center(16, 1.0), order) };
    let loader = Loader::start(Arc::clone(set), options).expect("starts");
    let mut all = Vec::new();
    for batch in loader {
        let batch = batch.map_err(|error| error.to_string())?;
        let classes = match classes {
            Classes::Batch => batch.labels(),
            Classes::Shards => {
                batch.samples.iter().map(|id| set.sample(*id).and_then(|s| s.class())).collect()
            }
        };
        let classes = classes.map_err(|error| error.to_string())?;
        assert_eq!(classes.len(), batch.len());
        assert!(classes.iter().all(Option::is_some));
        all.extend(&batch.samples);
    }
    Ok(all)
}

fn spaced(most: u64) -> Vec<u64> {
    (0..most).map(|position| position * SAMPLES / most).collect()
}

/// What a cache of so many shards holds, beside all indexes.
fn room(data: &Data, shards: u64) -> u64 {
    shards * data.largest() + 12 * 1000
}

/// One batch is of all twelve shards, which come and go one after the other.
#[test]
fn an_evaluation_needs_no_more_room_than_a_shard_takes() {
    let data = Data::new();
    let server = data.serve(|_| Answer::Well);
    for (shards, batch, classes) in [
        (4, 128, Classes::Batch),
        (4, 128, Classes::Shards),
        (1, 128, Classes::Batch),
        (1, 128, Classes::Shards),
        (4, 5, Classes::Shards),
        (1, 5, Classes::Batch),
        (1, 5, Classes::Shards),
    ] {
        for most in [SAMPLES, 20, 5, 1] {
            let cache = tempfile::tempdir().expect("a cache");
            let small = RemoteOptions { cache_bytes: room(&data, shards), ..options(cache.path()) };
            let set = Arc::new(open(&server.url("set"), &small).expect("opens"));
            let before = server.log().len();
            let all = evaluated(&set, (most, batch), classes);
            assert_eq!(all, Ok(spaced(most)), "{shards} shards, batches of {batch}");
            // Nothing comes that no sample is read of.
            let mut names: Vec<String> =
                server.log()[before..].iter().map(|request| request.name.clone()).collect();
            names.sort();
            names.dedup();
            let mut needed: Vec<u64> = spaced(most).iter().map(|id| id / EACH).collect();
            needed.dedup();
            let needed: Vec<String> = needed.iter().map(|at| format!("{at:06}.tar")).collect();
            assert_eq!(names, needed);
            if matches!(classes, Classes::Batch) {
                let fetched = set.fetched().expect("remote").shards;
                assert_eq!(fetched, needed.len() as u64, "each once");
            }
        }
    }
}

/// Four at once, each a set of its own as four processes have them, in a cache with room for one shard
/// or for two; and one that takes all the room there is.
#[test]
fn evaluations_that_share_a_small_cache_all_end() {
    let large = |number| if number % 16 == 5 { [320, 240] } else { [64 + number, 48] };
    for (data, shards) in [(Data::new(), 1), (Data::new(), 2), (Data::of(large), 1)] {
        let cache = tempfile::tempdir().expect("a cache");
        let server = data.serve(|_| Answer::Well);
        let small = RemoteOptions { cache_bytes: room(&data, shards), ..options(cache.path()) };
        let url = server.url("set");
        std::thread::scope(|scope| {
            for (most, batch, classes) in [
                (SAMPLES, 128, Classes::Batch),
                (20, 128, Classes::Shards),
                (SAMPLES, 7, Classes::Shards),
                (SAMPLES, 7, Classes::Batch),
            ] {
                let (small, url) = (&small, &url);
                scope.spawn(move || {
                    let set = Arc::new(open(url, small).expect("opens"));
                    assert_eq!(evaluated(&set, (most, batch), classes), Ok(spaced(most)));
                });
            }
        });
    }
}

/// What is on its way ahead of its time holds the room; nothing more of it comes before what is waited
/// for. (That it is waited for beyond the patience stands in the tests of the prefetcher's state.)
#[test]
fn what_is_waited_for_goes_before_what_comes_ahead() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let may_come = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&may_come);
    let server = data.serve(move |request| {
        if matches!(request.name.as_str(), "000001.tar" | "000002.tar") {
            until("they may come", || gate.load(Ordering::Relaxed));
        }
        Answer::Well
    });
    let small = RemoteOptions { cache_bytes: room(&data, 2), ..options(cache.path()) };
    let set = open(&server.url("set"), &small).expect("opens");
    let tars = || {
        let names = server.log().into_iter().map(|request| request.name);
        names.filter(|name| name.ends_with(".tar")).collect::<Vec<_>>()
    };
    set.want(vec![1, 2, 3, 4], 0);
    until("two come ahead", || tars().len() == 2);
    // Asked again and again whether it is to go on: the reader waits.
    let asked = AtomicU64::new(0);
    let is_over = || {
        asked.fetch_add(1, Ordering::Relaxed);
        false
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| set.sample_until(5 * EACH, &is_over).map(|_| ()));
        until("a reader waits", || asked.load(Ordering::Relaxed) > 3);
        may_come.store(true, Ordering::Relaxed);
        reader.join().expect("no panic").expect("one of them gives its room back");
    });
    assert_eq!(tars()[2], "000005.tar");
}

#[test]
fn shards_are_verified_in_a_cache_that_holds_two() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    let small = RemoteOptions { cache_bytes: room(&data, 2), ..options(cache.path()) };
    let read = AtomicU64::new(0);
    let report = verify(&[server.url("set")], &small, 4, &read).expect("opens");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!((report.shards, report.samples), (12, SAMPLES));
}

/// However many samples of however many shards lack room, the end is told once. (That they wait for it
/// once stands in the tests of the prefetcher's state.)
#[test]
fn a_batch_that_gets_no_room_is_told() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    let small = told_soon(cache.path(), room(&data, 2));
    let other = open(&server.url("set"), &small).expect("opens");
    let used = [other.sample(0).expect("room"), other.sample(EACH).expect("room")];
    let set = Arc::new(open(&server.url("set"), &small).expect("opens"));
    let error = evaluated(&set, (SAMPLES, 128), Classes::Batch).expect_err("no room");
    assert!(error.contains("no room") && error.contains("000002.tar"), "{error}");
    assert_eq!(set.fetched().expect("remote").shards, 0);

    // A true shuffle reads all shards at once.
    drop(used);
    drop(other);
    let order = Order::shuffled(SAMPLES, SAMPLES, 3).expect("an order");
    let options = LoaderOptions {
        views: Views::Decode,
        workers: 2,
        ..LoaderOptions::train(Recipe::default(), order, 7, 1)
    };
    let first = Loader::start(Arc::clone(&set), options).expect("starts").next();
    let error = first.expect("a batch").expect_err("no room").to_string();
    assert!(error.contains("no room"), "{error}");
    // What did not fit at once does one after the other. (A slow machine may be told again that it has no room.)
    until("all samples", || evaluated(&set, (SAMPLES, 128), Classes::Batch) == Ok(spaced(SAMPLES)));
}

/// The disk's fault, not the server's: told with the folder, and nothing half is left.
#[test]
fn a_full_disk_is_named_and_leaves_nothing() {
    const NAME: &str = "a_full_disk_is_named_and_leaves_nothing";
    if let Some(role) = Role::here() {
        let error = open(&role.url, &options(&role.cache)).and_then(|set| {
            set.sample(0)?;
            Ok(())
        });
        println!("{}", error.expect_err("no room"));
        return;
    }
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|_| Answer::Well);
    // A file may have 4 KiB: indexes fit, shards do not. SIGXFSZ is ignored, so that the write fails.
    let run = std::env::current_exe().expect("this program");
    let limit = "ulimit -f 8; trap '' XFSZ; exec \"$0\" --exact \"$1\" --nocapture";
    let output = Role { url: server.url("set"), cache: cache.path().to_path_buf() }
        .set(Command::new("bash").args(["-c", limit]).arg(run).arg(NAME))
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let folder = cache.path().display().to_string();
    assert!(text.contains("has no more room") && text.contains(&folder), "{text}");
    let kept = Cache::open(cache.path(), 1 << 30).expect("opens").usage().expect("lists");
    assert_eq!(kept.parts, 0);
}

/// What a process that a test starts is to do.
struct Role {
    url: String,
    cache: PathBuf,
}

impl Role {
    const VARIABLE: &str = "DETCO_REMOTE_CHILD";

    fn here() -> Option<Role> {
        let text = std::env::var_os(Role::VARIABLE)?.into_string().expect("text");
        let (url, cache) = text.split_once(' ').expect("two words");
        Some(Role { url: url.to_owned(), cache: cache.into() })
    }

    fn set<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env(Role::VARIABLE, format!("{} {}", self.url, self.cache.display()))
    }

    fn start(&self, name: &str) -> Running {
        let run = std::env::current_exe().expect("this program");
        let mut command = Command::new(run);
        let command = command.args(["--exact", name, "--nocapture"]);
        let child = self.set(command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Running { child, lines }
    }
}

/// A process that is killed when the test ends, however it ends.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    /// The rest of the next line that begins with `word`.
    fn hears(&mut self, word: &str) -> String {
        let mut line = String::new();
        while self.lines.read_line(&mut line).expect("reads") > 0 {
            // The test harness prints on the same line.
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
            line.clear();
        }
        panic!("the process ended without a word of {word}");
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn a_kill_in_the_middle_of_a_fetch_leaves_nothing_half_and_no_lock() {
    const NAME: &str = "a_kill_in_the_middle_of_a_fetch_leaves_nothing_half_and_no_lock";
    if let Some(role) = Role::here() {
        let set = open(&role.url, &options(&role.cache)).expect("opens");
        println!("opened");
        let sample = set.sample(0);
        println!("came {}", sample.is_ok());
        return;
    }
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match (request.name.as_str(), request.before) {
        ("000000.tar", 0) => Answer::Silent(5000),
        _ => Answer::Well,
    });
    let mut child = Role { url: server.url("set"), cache: cache.path().into() }.start(NAME);
    child.hears("opened");
    let parts = || {
        let all = std::fs::read_dir(cache.path()).expect("lists").map(|e| e.expect("an entry"));
        let part = |entry: &std::fs::DirEntry| entry.file_name().display().to_string();
        let mut parts = all.filter(|entry| part(entry).ends_with(".part"));
        parts.next().and_then(|entry| entry.metadata().ok()).map(|part| part.len())
    };
    until("a part of 5000 bytes", || parts() == Some(5000));
    child.kill();
    let set = open(&server.url("set"), &options(cache.path())).expect("opens");
    same(&set, &data.local());
    let from: Vec<u64> = server
        .log()
        .iter()
        .filter(|request| request.name == "000000.tar")
        .map(|request| request.from)
        .collect();
    assert_eq!(from, [0, 5000], "gone on with");
    assert_eq!(parts(), None);
}

#[test]
fn two_processes_fetch_each_shard_once_and_respect_what_the_other_reads() {
    const NAME: &str = "two_processes_fetch_each_shard_once_and_respect_what_the_other_reads";
    if let Some(role) = Role::here() {
        let set = open(&role.url, &options(&role.cache)).expect("opens");
        let all: usize =
            (0..set.len()).map(|id| set.sample(id).expect("a sample").jpeg().len()).sum();
        println!("read {all}");
        let _held = set.sample(0).expect("a sample");
        // Until the test closes its end.
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let server = data.serve(|request| match request.name.ends_with(".tar") {
        true => Answer::Slow(4096),
        false => Answer::Well,
    });
    let role = Role { url: server.url("set"), cache: cache.path().into() };
    let mut children = [role.start(NAME), role.start(NAME)];
    let local = data.local();
    let all: usize =
        (0..local.len()).map(|id| local.sample(id).expect("a sample").jpeg().len()).sum();
    for child in &mut children {
        assert_eq!(child.hears("read "), all.to_string());
    }
    let mut names: Vec<String> = server.log().into_iter().map(|request| request.name).collect();
    names.retain(|name| name.ends_with(".tar"));
    names.sort();
    names.dedup();
    let asked = server.log().iter().filter(|request| request.name.ends_with(".tar")).count();
    assert_eq!((names.len(), asked), (12, 12), "each once");

    // Everything but what they hold may go, for a cache that is stated smaller from now on.
    let sample = open(&server.url("set"), &options(cache.path())).expect("opens");
    let held = data.folder().join("000000.tar").metadata().expect("a shard").len();
    let name = detco_shards::format::manifest::Manifest::read(&data.folder().join("manifest.json"))
        .expect("reads")
        .shards[0]
        .sha256
        .clone();
    drop(sample);
    let small = Cache::open(cache.path(), 1).expect("opens");
    let priority = |_: &str| detco_shards::cache::Priority::Unneeded;
    let other = format!("{}.idx", "0".repeat(64));
    // What they have read and hold no more is unmapped after a while.
    until("one is left", || {
        small.evict_one(&other, &priority).expect("evicts");
        small.usage().expect("lists").files == 1
    });
    assert!(!small.evict_one(&other, &priority).expect("evicts"), "in use");
    let left = small.usage().expect("lists");
    assert_eq!((left.files, left.bytes), (1, held), "the shard that they read");
    for child in &mut children {
        child.child.stdin.take().expect("piped").write_all(b"\n").expect("writes");
        assert!(child.child.wait().expect("ends").success());
    }
    assert!(small.evict_one(&other, &priority).expect("evicts"), "the locks went with them");
    assert!(!cache.path().join(format!("{name}.tar")).exists());
}

/// Python's own server: another implementation, and one that knows no ranges.
#[test]
fn a_server_without_ranges_is_asked_from_the_beginning() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let program = r#"
import http.server, os, sys
os.chdir(sys.argv[1])
class Handler(http.server.SimpleHTTPRequestHandler):
    cut = set()
    def copyfile(self, source, output):
        if self.path.endswith(".tar") and self.path not in self.cut:
            self.cut.add(self.path)
            output.write(source.read(3000)); output.flush(); self.connection.shutdown(2)
        else:
            super().copyfile(source, output)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("port", server.server_port, flush=True)
server.serve_forever()
"#;
    let mut server = serve_python(program, &data.folder());
    let url = format!("http://127.0.0.1:{}", server.hears("port "));
    let set = open(&url, &options(cache.path())).expect("opens");
    same(&set, &data.local());
    let bytes: u64 = set.shards().iter().map(|shard| shard.bytes()).sum();
    assert_eq!(set.fetched().expect("remote").bytes, bytes + 12 * 3000);
}

fn serve_python(program: &str, folder: &Path) -> Running {
    let mut command = Command::new(python());
    let command = command.args(["-c", program]).arg(folder);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.expect("Python starts");
    let lines = BufReader::new(child.stdout.take().expect("piped"));
    Running { child, lines }
}

/// moto is the S3 that botocore's users test against: signatures, listing, ranges, its own errors.
#[test]
fn an_s3_compatible_server_serves_a_folder_a_list_and_parts() {
    run_python("import boto3, flask, moto", &[]);
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let program = r#"
import os, pathlib, sys
os.environ.update(AWS_ACCESS_KEY_ID="id", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="eu-north-1")
import boto3
from moto.server import ThreadedMotoServer
import logging; logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
s3.create_bucket(Bucket="images", CreateBucketConfiguration={"LocationConstraint": "eu-north-1"})
for path in pathlib.Path(sys.argv[1]).iterdir():
    s3.upload_file(str(path), "images", f"train/{path.name}")
    if path.suffix != ".json": s3.upload_file(str(path), "images", f"bare/{path.name}")
print("port", port, flush=True)
sys.stdin.read()
"#;
    let mut server = serve_python(program, &data.folder());
    let endpoint = format!("http://127.0.0.1:{}", server.hears("port "));
    let variables = [
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-north-1"),
        ("AWS_ENDPOINT_URL", &endpoint),
    ];
    let environment = variables.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let options = RemoteOptions { environment, ..options(cache.path()) };
    let local = data.local();
    for url in ["s3://images/train", "s3://images/train/", "s3://images/train/{000000..000011}.tar"]
    {
        same(&open(url, &options).expect(url), &local);
    }
    // No manifest: what the bucket lists, with the indexes beside them; nobody knows digests.
    let bare = open("s3://images/bare", &options).expect("opens");
    assert_eq!((bare.len(), bare.classes().len()), (SAMPLES, 0));
    assert_ne!(bare.fingerprint(), local.fingerprint());
    for id in 0..SAMPLES {
        assert_eq!(bare.sample(id).expect("there").jpeg(), local.sample(id).expect("here").jpeg());
    }
    let missing = open("s3://images/train/{000000..000012}.tar", &options).expect_err("unlisted");
    assert!(matches!(missing, ShardError::Spec { fault: SpecFault::Unlisted { .. }, .. }));
    let missing = open("s3://images/bare/000012.tar", &options).expect_err("missing");
    assert!(matches!(fault(missing), (url, RemoteFault::Missing) if url.ends_with("000012.tar")));
    let missing = open("s3://images/nothing", &options).expect_err("empty");
    assert!(matches!(missing, ShardError::Spec { fault: SpecFault::Empty, .. }));
}

/// The addresses of the other stores lead where their variables say: to our own server, which knows
/// their plain reads.
#[test]
fn google_and_azure_urls_reach_their_stores() {
    let (data, cache) = (Data::new(), tempfile::tempdir().expect("a cache"));
    let bucket = data.root.path().join("account/bucket");
    std::fs::create_dir_all(&bucket).expect("creates");
    std::os::unix::fs::symlink(data.folder(), bucket.join("train")).expect("links");
    std::os::unix::fs::symlink(&bucket, data.root.path().join("bucket")).expect("links");
    let server = data.serve(|_| Answer::Well);
    let here = format!("http://127.0.0.1:{}", server.port());
    let variables = [
        ("GOOGLE_BASE_URL", here.clone()),
        ("GOOGLE_SKIP_SIGNATURE", "true".into()),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account".into()),
        ("AZURE_STORAGE_ENDPOINT", format!("{here}/account")),
        ("AZURE_SKIP_SIGNATURE", "true".into()),
    ];
    let environment = variables.map(|(key, value)| (key.to_owned(), value)).to_vec();
    for url in ["gs://bucket/train", "az://bucket/train"] {
        let cache = tempfile::tempdir_in(cache.path()).expect("a cache");
        let options = RemoteOptions { environment: environment.clone(), ..options(cache.path()) };
        same(&open(url, &options).expect(url), &data.local());
    }
}
