//! A data set is the same from a folder and by URL: its samples, those that cannot be used and why,
//! its classes, and what is odd about it.

#[expect(dead_code, reason = "no need of Python here")]
mod common;
#[expect(dead_code, reason = "this server does no wrong")]
mod remote_server;

use std::path::Path;
use std::sync::Mutex;

use common::jpeg;
use detco_shards::format::manifest::Part;
use detco_shards::pack::{self, Job, Options, Progress};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::RemoteOptions;
use remote_server::{Answer, Server};

/// What opening said, of both tests: each looks for its own paths.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn say(text: &str) {
    SAID.lock().expect("not poisoned").push(text.to_owned());
}

/// What was said of these places since the last time, with `…` for where they are.
fn said(place: &str) -> Vec<String> {
    let mut all = SAID.lock().expect("not poisoned");
    let (ours, others) = all.drain(..).partition(|text: &String| text.contains(place));
    *all = others;
    let mut ours: Vec<String> = ours.iter().map(|text| text.replace(place, "…")).collect();
    // By URL a person is told that opening takes long.
    ours.retain(|text| !text.contains("fetched once"));
    ours
}

/// Everything that a reader can ask of a set.
fn told(set: &ShardSet, place: &str) -> Vec<String> {
    let mut told = vec![format!("{:?} {} bad", set.classes(), set.bad_samples())];
    told.extend(set.one_numbering().err().map(|error| error.to_string()));
    for id in 0..set.len() {
        told.push(match set.sample(id) {
            Ok(sample) => format!(
                "{} at {}, {} bytes, class {:?}, {} of text",
                sample.key,
                sample.offset,
                sample.jpeg().len(),
                sample.class().map_err(|error| error.to_string()),
                sample.member("txt").expect("in place").map_or(0, <[u8]>::len),
            ),
            Err(error) => error.to_string(),
        });
    }
    told.iter().map(|line| line.replace(place, "…")).collect()
}

/// Opens these names below a folder, and below the URL of a server of that folder.
fn both(root: &Path, names: &[&str]) -> [Vec<String>; 2] {
    let server = Server::start(root, |_| Answer::Well);
    let cache = tempfile::tempdir().expect("a folder");
    let options = RemoteOptions { notice: Some(say), ..RemoteOptions::new(cache.path(), 1 << 30) };
    let open = |place: &str| {
        let spec: Vec<String> = names.iter().map(|name| format!("{place}/{name}")).collect();
        let told = || {
            let set = ShardSet::open_with(&spec, Some(&options)).expect("opens");
            told(&set, place)
        };
        // A list of the shard's files is made the first time, and read the second.
        let mut first = told();
        let odd = said(place);
        assert_eq!(first, told());
        said(place);
        first.extend(odd);
        first
    };
    let url = server.url("");
    [open(root.to_str().expect("UTF-8")), open(url.trim_end_matches('/'))]
}

#[test]
fn an_odd_shard_is_as_odd_by_url() {
    let root = tempfile::tempdir().expect("a folder");
    let file = std::fs::File::create(root.path().join("0.tar")).expect("creates");
    let mut tar = tar::Builder::new(file);
    let image = jpeg(7, 24, 16);
    let mut add = |name: &[u8], kind: tar::EntryType, link: &str, bytes: &[u8]| {
        use std::os::unix::ffi::OsStrExt as _;
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        match link {
            "" => tar.append_data(&mut header, name, bytes).expect("appends"),
            link => tar.append_link(&mut header, name, link).expect("appends"),
        }
    };
    use tar::EntryType::{Link, Regular, Symlink};
    for (name, kind, link, bytes) in [
        (&b"a.jpg"[..], Regular, "", &image[..]),
        (b"a.cls", Regular, "", b"3"),
        (b"a.txt", Regular, "", b"a cat"),
        (b"hard.jpg", Link, "a.jpg", b""),
        (b"hard.cls", Regular, "", b"1"),
        (b"soft.jpg", Symlink, "my cat/a.jpg", b""),
        (b"two.jpg", Regular, "", &image),
        (b"two.png", Regular, "", &image),
        (b"twice.jpg", Regular, "", &image),
        (b"twice.JPG", Regular, "", &image),
        (b"none.json", Regular, "", b"{}"),
        (b"web.webp", Regular, "", &image),
        (b"my cat 1.jpg", Regular, "", &image),
        (b"my cat 1.cls", Regular, "", b"cat"),
        (b"\xe9t\xe9.jpg", Regular, "", &image),
        (b"22.01.jpg", Regular, "", &image),
        (b"22.02.jpg", Regular, "", &image),
        (b"README", Regular, "", b"read me"),
    ] {
        add(name, kind, link, bytes);
    }
    tar.into_inner().expect("finishes");
    let [local, remote] = both(root.path(), &["0.tar"]);
    assert_eq!(local, remote);
    let all = local.join("\n");
    for part in [
        "7 bad",
        "`hard.jpg` is a link to `a.jpg`",
        "`soft.jpg` is a link to `my cat/a.jpg`",
        "1 sample has several pictures",
        "5 of text",
    ] {
        assert!(all.contains(part), "{part}: {all}");
    }
    // So are they with an index of another program's beside the shard.
    std::fs::write(root.path().join("0.idx"), "v1.1 3\njpg 512 900 a 1\n").expect("writes");
    let [local, remote] = both(root.path(), &["0.tar"]);
    assert_eq!(local[..local.len() - 2], remote[..remote.len() - 2]);
    assert!(local.iter().any(|line| line.contains("0.idx")), "{local:?}");
    assert!(remote.iter().any(|line| line.contains("0.idx")), "{remote:?}");
}

#[test]
fn sets_that_are_read_as_one_are_one_by_url() {
    let root = tempfile::tempdir().expect("a folder");
    for (name, classes, first) in
        [("pets", ["cat", "dog"], 0), ("cars", ["bus", "car"], 10), ("more", ["cat", "dog"], 2)]
    {
        let source = root.path().join("images").join(name);
        for (class, number) in classes.iter().zip(0..) {
            std::fs::create_dir_all(source.join(class)).expect("creates");
            for i in 0..3 {
                let file = source.join(class).join(format!("{i}.jpg"));
                std::fs::write(file, jpeg(first + number * 3 + i, 24, 16)).expect("writes");
            }
        }
        let job = Job {
            source,
            out: root.path().join(name),
            options: Options::default(),
            part: Part::WHOLE,
            workers: 1,
            resume: false,
        };
        pack::run(&job, &Progress::default()).expect("packs");
    }
    let [local, remote] = both(root.path(), &["pets", "cars"]);
    assert_eq!(local, remote);
    assert!(local[1].contains("list different classes"), "{local:?}");
    let [local, remote] = both(root.path(), &["pets", "more"]);
    assert_eq!(local, remote);
    assert!(local[13].contains("have the same 4 images"), "{local:?}");
}
