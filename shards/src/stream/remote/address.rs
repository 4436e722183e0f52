//! The URL of an object, taken apart: what is asked for, what a person is shown, what the cache is
//! named by.
//!
//! - **Asked for**: the URL without user and password; those become an `Authorization` header.
//! - **Shown**: without user and password, and without the values of query parameters that might be
//!   secret: only those in [`SHOWN`] keep theirs, the rest is `…`.
//! - **Identity**, which names an object in the cache: without user, password and signature
//!   ([`signs`]), so that two signatures of one object share a file; all other parameters
//!   (`versionId`, `generation`, `snapshot`, …) are part of it.

use std::fmt;

use percent_encoding::percent_decode_str;
use url::{Position, Url};

use crate::format::{RemoteFault, ShardError};

/// What stands in a shown URL for what it hides.
const HIDDEN: &str = "…";

/// Query parameters that hold no secret, in lower case: versions, and names of files.
const SHOWN: [&str; 13] = [
    "versionid",
    "generation",
    "snapshot",
    "version",
    "revision",
    "ref",
    "download",
    "dl",
    "raw",
    "file",
    "filename",
    "name",
    "path",
];

/// Query parameters that say which version of an object is meant, in lower case.
const VERSIONS: [&str; 3] = ["versionid", "generation", "snapshot"];

/// Parameters that sign, or stand for a person, in lower case.
const SIGNATURES: [&str; 20] = [
    "signature",
    "sig",
    "expires",
    "policy",
    "key-pair-id",
    "awsaccesskeyid",
    "googleaccessid",
    "ossaccesskeyid",
    "security-token",
    "token",
    "access_token",
    "auth",
    "auth_key",
    "authorization",
    "api_key",
    "apikey",
    "hdnts",
    "hdnea",
    "__token__",
    "password",
];

/// Parameters that sign whatever follows the dash.
const SIGNING: [&str; 4] = ["x-amz-", "x-goog-", "x-oss-", "q-"];

/// The rest of an Azure shared access signature: short names that mean something else elsewhere, so
/// they count only beside `sig`.
const SHARED_ACCESS: [&str; 20] = [
    "sv", "ss", "srt", "sr", "sp", "st", "se", "sip", "spr", "si", "sdd", "skoid", "sktid", "skt",
    "ske", "sks", "skv", "saoid", "suoid", "scid",
];

/// A URL, taken apart.
#[derive(Clone)]
pub(super) struct Address {
    /// As it is asked for: without user, password and fragment.
    url: Url,
    /// User and password, decoded.
    login: Option<(String, String)>,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

/// Whether a word of the user's is a URL.
pub fn is_url(word: &str) -> bool {
    let part = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    word.split_once("://").is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic()) && scheme.bytes().all(part)
    })
}

/// A word of the user's as it may be printed and written down: of URLs, without user, password and
/// the values of query parameters that might be secret, in whose place `…` stands.
pub fn shown(word: &str) -> String {
    let Some((scheme, rest)) = word.split_once("://").filter(|_| is_url(word)) else {
        return word.to_owned();
    };
    // Where this is no URL, a password may hold any letter: nothing before the last @ is shown.
    let rest = match Url::parse(word) {
        Ok(_) => rest,
        Err(_) => rest.rsplit('@').next().unwrap_or(rest),
    };
    let (rest, fragment) = rest.split_once('#').map_or((rest, false), |(rest, _)| (rest, true));
    let (path, query) = rest.split_once('?').map_or((rest, None), |(path, q)| (path, Some(q)));
    let authority = path.find('/').unwrap_or(path.len());
    let path = path[..authority].rfind('@').map_or(path, |at| &path[at + 1..]);
    let query = query.map_or_else(String::new, |query| format!("?{}", shown_query(query)));
    format!("{scheme}://{path}{query}{}", if fragment { "#…" } else { "" })
}

/// Several words, shown.
pub(crate) fn shown_all(words: &[String]) -> String {
    words.iter().map(|word| shown(word)).collect::<Vec<_>>().join(" ")
}

fn shown_query(query: &str) -> String {
    let open = |pair: &&str| SHOWN.contains(&name_of(pair).as_str());
    let mut kept: Vec<&str> = query.split('&').filter(open).collect();
    if query.split('&').any(|pair| !pair.is_empty() && !open(&pair)) {
        kept.push(HIDDEN);
    }
    kept.join("&")
}

/// A parameter's name in lower case.
fn name_of(pair: &str) -> String {
    let name = pair.split('=').next().unwrap_or(pair);
    percent_decode_str(name).decode_utf8_lossy().to_ascii_lowercase()
}

/// Whether a parameter signs; `shared` says that the query has a `sig`.
fn signs(pair: &str, shared: bool) -> bool {
    let name = name_of(pair);
    SIGNATURES.contains(&name.as_str())
        || SIGNING.iter().any(|start| name.starts_with(start))
        || shared && SHARED_ACCESS.contains(&name.as_str())
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

impl Address {
    /// Takes a URL apart.
    ///
    /// # Errors
    ///
    /// It is none, has a fragment, or was shown and so has lost a part.
    pub(super) fn parse(text: &str) -> Result<Address, ShardError> {
        let fail = |reason: String| ShardError::remote(&shown(text), RemoteFault::Url { reason });
        let mut url = Url::parse(text).map_err(|error| fail(error.to_string()))?;
        if url.scheme() == "file" {
            return Err(fail("it names a file of this machine: name its path alone".into()));
        }
        if url.fragment().is_some() {
            return Err(fail("it has a fragment: in a name, write %23 for #".into()));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(fail("it names no host or bucket".into()));
        }
        let query = text.split_once('?').map_or("", |(_, query)| query);
        if query.split('&').any(|pair| pair == HIDDEN) {
            let reason = "signatures and tokens in URLs are not written down: name the data again, \
                          with all of its URL (--data)";
            return Err(fail(reason.into()));
        }
        let user = decoded(url.username());
        let password = decoded(url.password().unwrap_or(""));
        let login = (!user.is_empty() || !password.is_empty()).then_some((user, password));
        if login.is_some() && (url.set_username("").is_err() || url.set_password(None).is_err()) {
            return Err(fail("it has a user but no host".into()));
        }
        Ok(Address { url, login })
    }

    /// As it is asked for.
    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// User and password.
    pub(super) fn login(&self) -> Option<(&str, &str)> {
        self.login.as_ref().map(|(user, password)| (user.as_str(), password.as_str()))
    }

    /// As a person sees it.
    pub(super) fn shown(&self) -> String {
        shown(self.url.as_str())
    }

    fn pairs(&self) -> impl Iterator<Item = &str> {
        self.url.query().unwrap_or("").split('&').filter(|pair| !pair.is_empty())
    }

    /// What names the object, whoever asks for it.
    pub(super) fn identity(&self) -> String {
        let shared = self.pairs().any(|pair| name_of(pair) == "sig");
        let kept: Vec<&str> = self.pairs().filter(|pair| !signs(pair, shared)).collect();
        let path = &self.url[..Position::AfterPath];
        if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) }
    }

    /// Whether the query signs.
    pub(super) fn is_signed(&self) -> bool {
        let shared = self.pairs().any(|pair| name_of(pair) == "sig");
        self.pairs().any(|pair| signs(pair, shared))
    }

    /// The version that the query names: parameter and value.
    pub(super) fn version(&self) -> Option<(String, String)> {
        let mut versions = self.url.query_pairs();
        let found = versions.find(|(name, _)| VERSIONS.contains(&name.to_lowercase().as_str()));
        found.map(|(name, value)| (name.into_owned(), value.into_owned()))
    }

    /// Whether the query names anything but a version.
    pub(super) fn has_more_than_a_version(&self) -> bool {
        self.pairs().any(|pair| !VERSIONS.contains(&name_of(pair).as_str()))
    }

    /// The last component of its path, decoded; empty for a folder.
    pub(super) fn name(&self) -> String {
        decoded(self.url.path().rsplit('/').next().unwrap_or(""))
    }

    /// The folder it lies in, up to its last slash and without the query.
    pub(super) fn folder(&self) -> &str {
        let path = &self.url[..Position::AfterPath];
        &path[..path.rfind('/').map_or(0, |slash| slash + 1)]
    }

    /// The same path as a folder's.
    pub(super) fn as_folder(&self) -> Address {
        let mut folder = self.clone();
        if let Ok(mut segments) = folder.url.path_segments_mut() {
            segments.pop_if_empty().push("");
        }
        folder
    }

    /// A file beside it, asked for with the same signature.
    pub(super) fn sibling(&self, name: &str) -> Address {
        let mut sibling = self.clone();
        if let Ok(mut segments) = sibling.url.path_segments_mut() {
            segments.pop().push(name);
        }
        sibling
    }

    /// What no message may hold: the password, and the values that [`Address::shown`] hides.
    pub(super) fn secrets(&self) -> Vec<String> {
        let hidden = self.pairs().filter(|pair| !SHOWN.contains(&name_of(pair).as_str()));
        let values = hidden.filter_map(|pair| pair.split_once('='));
        let mut secrets: Vec<String> =
            values.flat_map(|(_, value)| [value.to_owned(), decoded(value)]).collect();
        secrets.extend(self.login.iter().map(|(_, password)| password.clone()));
        secrets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_holds_no_secret() {
        for (word, expected) in [
            ("shards/train", "shards/train"),
            ("https://h/a.tar", "https://h/a.tar"),
            ("https://me:secret@h:8080/{0..3}.tar", "https://h:8080/{0..3}.tar"),
            ("https://me:se@cret@h/a@b.tar", "https://h/a@b.tar"),
            ("https://me:se/cret@h/a.tar", "https://h/a.tar"),
            ("https://me:se?cret@h/a.tar", "https://h/a.tar"),
            ("https://h/a.tar?X-Amz-Signature=abc&versionId=7", "https://h/a.tar?versionId=7&…"),
            ("https://h/a.tar?download=true", "https://h/a.tar?download=true"),
            ("https://h/a.tar?sv=1&sig=a%2Fb", "https://h/a.tar?…"),
            ("https://h?sig=abc", "https://h?…"),
            ("https://h/a.tar#secret", "https://h/a.tar#…"),
            ("http://[::1]:80/a.tar", "http://[::1]:80/a.tar"),
        ] {
            assert_eq!(shown(word), expected, "{word}");
        }
        let address = Address::parse("https://me:secret@h/a.tar?sig=abc%2F&versionId=7").unwrap();
        assert_eq!(format!("{address:?}"), "https://h/a.tar?versionId=7&…");
        assert_eq!(address.secrets(), ["abc%2F", "abc/", "secret"]);
    }

    #[test]
    fn an_object_has_one_identity_whoever_signs() {
        let identity = |text: &str| Address::parse(text).unwrap().identity();
        for (one, other) in [
            ("https://h/a.tar", "https://me:secret@h/a.tar"),
            ("https://h/a.tar", "HTTPS://H:443/a.tar?X-Amz-Date=1&X-Amz-Signature=2"),
            ("https://h/a.tar?X-Goog-Signature=1", "https://h/a.tar?X-Goog-Signature=2"),
            ("https://h/a.tar?sv=1&sr=b&sig=2", "https://h/a.tar?sv=3&sr=c&sig=4&se=5"),
            ("https://h/a.tar?id=1&token=2", "https://h/a.tar?token=3&id=1"),
            ("https://h/a.tar?Expires=1&Signature=2&Key-Pair-Id=3", "https://h/a.tar"),
        ] {
            assert_eq!(identity(one), identity(other), "{one} {other}");
        }
        for (one, other) in [
            ("https://h/a.tar?versionId=1&X-Amz-Signature=1", "https://h/a.tar?versionId=2"),
            ("https://h/a.tar?generation=1", "https://h/a.tar"),
            ("https://h/a.tar?snapshot=1&sig=1", "https://h/a.tar?snapshot=2&sig=1"),
            ("https://h/get.tar?id=1", "https://h/get.tar?id=2"),
            ("https://h/get.tar?sr=1", "https://h/get.tar?sr=2"), // no signature without `sig`
            ("https://h/A.tar", "https://h/a.tar"),
        ] {
            assert_ne!(identity(one), identity(other), "{one} {other}");
        }
    }

    #[test]
    fn names_folders_and_siblings_keep_the_signature_and_any_byte() {
        let shard = Address::parse("https://h/my%20set/a+b%23.tar?sig=1").unwrap();
        assert_eq!((shard.name().as_str(), shard.folder()), ("a+b#.tar", "https://h/my%20set/"));
        let sibling = shard.sibling("c d?%#.tar");
        assert_eq!(sibling.url().as_str(), "https://h/my%20set/c%20d%3F%25%23.tar?sig=1");
        assert_eq!(sibling.name(), "c d?%#.tar");
        for (text, folder) in [
            ("https://h", "https://h/"),
            ("https://h/set", "https://h/set/"),
            ("https://h/set/", "https://h/set/"),
            ("s3://bucket", "s3://bucket/"),
            ("http://[::1]:8/set?sig=1", "http://[::1]:8/set/"),
        ] {
            assert_eq!(Address::parse(text).unwrap().as_folder().folder(), folder);
        }
        for wrong in ["https://", "https://h/a#b.tar", "file:///a.tar", "https://h/a.tar?…"] {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
    }
}
