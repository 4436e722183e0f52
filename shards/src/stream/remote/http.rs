//! Objects over plain HTTP, as in RFC 9110 and as real servers behave: one request, and the meaning of its
//! response.
//!
//! Only GET is used: a signed URL allows nothing else, and the length that HEAD gives is that of another
//! response where a server compresses. The size comes from the first block of an object. A server may
//! ignore a range and send all of the object; say no length; redirect, to where no credentials follow;
//! name a version by a weak validator, or by none.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName,
    LAST_MODIFIED, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode};

use super::address::Address;
use super::credentials::{Credentials, is_hub};
use super::secrets::Secrets;
use super::store::Failure;
use crate::format::RemoteFault;

/// The requested bytes of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// All of it.
    Whole,
    /// Its first block, which tells its size and its kind.
    Block,
    /// From this byte on.
    From(u64),
}

/// The first block of a tar.
pub(super) const BLOCK: usize = 512;

/// A response with bytes of the object.
pub(super) struct Answer {
    pub(super) response: Response,
    /// Where its bytes begin in the object.
    pub(super) start: u64,
    /// One past the last of them, if the server tells.
    pub(super) end: Option<u64>,
    /// Size of the whole object, if the server tells.
    pub(super) total: Option<u64>,
    /// `ETag`, without the mark of weakness.
    pub(super) etag: Option<String>,
    /// `Last-Modified`, as it stands.
    pub(super) modified: Option<String>,
    /// Whether it is compressed in transit.
    pub(super) gzip: bool,
}

/// The client and its credentials.
#[derive(Debug)]
pub(super) struct Http {
    client: Client,
    credentials: Arc<Credentials>,
}

impl Http {
    pub(super) fn new(
        credentials: Arc<Credentials>,
        connect: Duration,
        stall: Duration,
    ) -> Result<Http, reqwest::Error> {
        let client = Client::builder()
            .user_agent(concat!("detco/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(connect)
            .read_timeout(stall)
            .http1_only() // a connection for each shard that comes
            .referer(false) // which would carry a signature to where a redirect leads
            .build()?;
        Ok(Http { client, credentials })
    }

    /// Sends one request and reads the head of its response.
    pub(super) async fn ask(
        &self,
        address: &Address,
        asked: Asked,
        secrets: &Secrets,
    ) -> Result<Answer, Failure> {
        let mut request =
            self.client.get(address.url().clone()).header(ACCEPT_ENCODING, "identity");
        request = match asked {
            Asked::Whole => request,
            Asked::Block => request.header(RANGE, format!("bytes=0-{}", BLOCK - 1)),
            Asked::From(offset) => request.header(RANGE, format!("bytes={offset}-")),
        };
        let request = self.credentials.apply(request, address);
        let sent = request.send().await;
        let response = sent.map_err(|error| secrets.failure(error, address))?;
        answer(response, address, asked)
    }
}

/// A header as text, if there is one.
fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim).filter(|value| !value.is_empty())
}

/// Reads the head of a response.
fn answer(response: Response, address: &Address, asked: Asked) -> Result<Answer, Failure> {
    let (status, headers) = (response.status(), response.headers());
    let ranged = asked != Asked::Whole;
    let gzip = match text(headers, CONTENT_ENCODING).map(str::to_ascii_lowercase).as_deref() {
        None | Some("identity") => false,
        Some("gzip" | "x-gzip") => true,
        Some(other) => {
            let encoding = other.chars().take(40).collect();
            return Err(Failure::Final(RemoteFault::Encoding { encoding }));
        }
    };
    let etag = text(headers, ETAG).map(|etag| etag.strip_prefix("W/").unwrap_or(etag).to_owned());
    let modified = text(headers, LAST_MODIFIED).map(str::to_owned);
    let (start, end, total) = match status {
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => {
            let length = text(headers, CONTENT_LENGTH).and_then(|text| text.parse().ok());
            let total = length.filter(|_| !gzip);
            (0, total, total)
        }
        // Bytes of something compressed are no bytes of the object.
        StatusCode::PARTIAL_CONTENT if ranged && !gzip => {
            let range = text(headers, CONTENT_RANGE).and_then(content_range);
            let (start, end, total) = range.ok_or(Failure::NoRanges)?;
            (start, Some(end), total)
        }
        StatusCode::PARTIAL_CONTENT => return Err(Failure::NoRanges),
        _ => return Err(refused(&response, address, ranged)),
    };
    Ok(Answer { response, start, end, total, etag, modified, gzip })
}

/// `bytes 0-511/2048` to the first byte, one past the last, and the size of the whole, if that is no
/// `*`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, rest) = text.split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let sound = unit.eq_ignore_ascii_case("bytes")
        && first <= last
        && total.is_none_or(|total| last < total);
    sound.then(|| (first, last.saturating_add(1), total))
}

/// The meaning of a response without the object.
fn refused(response: &Response, address: &Address, ranged: bool) -> Failure {
    let (status, headers) = (response.status(), response.headers());
    let reason = ["x-error-code", "x-amz-error-code", "x-ms-error-code"];
    let mut reason = reason.into_iter().filter_map(|name| headers.get(name)?.to_str().ok());
    let word = |text: &&str| {
        text.len() <= 60 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let reason = reason.find(word).map_or_else(String::new, |reason| format!(" ({reason})"));
    let answer = format!("{}{reason}", status.as_u16());
    match status.as_u16() {
        404 | 410 => Failure::Final(RemoteFault::Missing),
        // Google tells so of a signature that has expired.
        400 if address.is_signed() && !ranged => {
            Failure::Final(RemoteFault::Denied { answer, advice: advice(address) })
        }
        401 | 403 => Failure::Final(RemoteFault::Denied { answer, advice: advice(address) }),
        407 => {
            let advice = "the proxy wants to know who asks: HTTPS_PROXY=http://user:password@host";
            Failure::Final(RemoteFault::Denied { answer, advice: advice.into() })
        }
        // Not to be asked for ranges: of nothing there are none, and not every server knows them.
        400 | 405 | 406 | 416 | 501 if ranged => Failure::NoRanges,
        408 | 425 | 429 | 500..=599 => {
            let after = text(headers, RETRY_AFTER).and_then(|text| text.parse().ok());
            let status = match status.canonical_reason() {
                Some(name) => format!("{answer} {name}"),
                None => answer,
            };
            let cause = format!("the server answers {status}");
            Failure::Passing(cause.into(), after.map(Duration::from_secs))
        }
        _ => Failure::Final(RemoteFault::Refused { answer }),
    }
}

/// Possible causes of a refusal.
fn advice(address: &Address) -> String {
    if address.is_signed() {
        "the signature may have expired, or be another object's: sign the URL anew".into()
    } else if address.login().is_some() {
        "user and password are those in the URL".into()
    } else if is_hub(address.url()) {
        "HF_TOKEN holds the token for Hugging Face, whose owner must have agreed to the data's terms"
            .into()
    } else {
        "credentials for HTTP come from DETCO_HTTP_TOKEN, DETCO_HTTP_AUTHORIZATION, ~/.netrc, or \
         user:password@ in the URL"
            .into()
    }
}

/// What the beginning of something is, if it is text, which no tar begins as: its first header holds
/// zeros.
pub(super) fn page(begins: &[u8]) -> Option<RemoteFault> {
    let head = &begins[..begins.len().min(BLOCK)];
    let letter = |byte: &u8| !byte.is_ascii_control() || matches!(byte, b'\t' | b'\n' | b'\r' | 12);
    if head.is_empty() || !head.iter().all(letter) {
        return None;
    }
    let head = String::from_utf8_lossy(head);
    let head = head.trim_start_matches('\u{feff}').trim();
    let what = match head.chars().next() {
        Some('<') if head.starts_with("<?xml") && !head.contains("<html") => "an XML text",
        Some('<') => "a web page",
        Some('{' | '[') => "a JSON text",
        _ => "a text",
    };
    // Of one line: it is printed in the middle of one.
    let begins: String =
        head.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(60).collect();
    Some(RemoteFault::Page { what, begins })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_nonsense_is_not() {
        for (text, expected) in [
            ("bytes 0-511/2048", Some((0, 512, Some(2048)))),
            ("Bytes 5-5/*", Some((5, 6, None))),
            ("bytes  0-511/512", Some((0, 512, Some(512)))),
            ("bytes */2048", None),
            ("bytes 5-4/10", None),
            ("bytes 0-10/10", None),
            ("bytes 0-18446744073709551615/*", Some((0, u64::MAX, None))),
            ("bytes 0-18446744073709551616/*", None),
            ("lines 0-1/2", None),
            ("bytes=0-1/2", None),
            ("", None),
        ] {
            assert_eq!(content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn text_is_told_from_a_tar() {
        let what = |bytes: &[u8]| match page(bytes) {
            Some(RemoteFault::Page { what, begins }) => Some((what, begins)),
            _ => None,
        };
        let of = |what, begins: &str| Some((what, begins.to_owned()));
        let login = b"\xef\xbb\xbf\r\n<!doctype html>\n <p>Log in";
        assert_eq!(what(login), of("a web page", "<!doctype html> <p>Log in"));
        let xml = b"<?xml version=\"1.0\"?><Error/>";
        assert_eq!(what(xml), of("an XML text", "<?xml version=\"1.0\"?><Error/>"));
        assert_eq!(what(b"{\"error\": 1}"), of("a JSON text", "{\"error\": 1}"));
        assert_eq!(what(b"Not here"), of("a text", "Not here"));
        assert_eq!(what("Größe".as_bytes()), of("a text", "Größe"));
        assert_eq!(what(&[]), None);
        assert_eq!(what(&[0; 512]), None);
        assert_eq!(what(b"\x1f\x8b\x08\x00"), None);
        let mut header = vec![0; 512];
        header[..10].copy_from_slice(b"<html>.jpg");
        assert_eq!(what(&header), None);
    }
}
