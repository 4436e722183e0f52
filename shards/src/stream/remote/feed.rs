//! The body of one response on its way to a sink: checked against what is known of the object, decompressed,
//! and without the bytes that the sink has already.

use std::io::Write as _;

use flate2::write::MultiGzDecoder;
use futures_util::StreamExt as _;
use object_store::path::Path as ObjectPath;
use object_store::{Error as StoreError, GetOptions, GetRange, ObjectStore};
use sha2::{Digest as _, Sha256};

use super::http::{self, Asked, Http};
use super::secrets::Secrets;
use super::store::{About, Failure, Object, Place};
use crate::format::{RemoteFault, ShardError};

/// The sink of an object's bytes.
pub(super) trait Sink {
    /// Number of bytes that it has.
    fn have(&self) -> u64;
    /// Empties it.
    fn restart(&mut self) -> Result<(), ShardError>;
    /// Bytes were received again that it has already.
    fn again(&mut self, _bytes: u64) {}
    /// Appends bytes.
    fn take(&mut self, piece: &[u8]) -> Result<(), ShardError>;
}

/// The kind of object being fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A shard of known size and version; text is not one.
    Shard,
    /// A shard of unknown size.
    Unmeasured,
    /// Any object.
    Small,
}

/// The result of a complete response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// The rest of the object, as far as the server tells.
    All,
    /// A part of it: servers may limit what they send at a time.
    Piece,
}

/// The body of a response on its way to a sink.
pub(super) struct Feed<'a> {
    secrets: &'a Secrets,
    object: &'a Object,
    about: &'a About,
    kind: Kind,
    sink: &'a mut dyn Sink,
    /// What the object begins with, until there is enough of it to be judged, and what is wrong with
    /// it if it is no page.
    head: Option<(Vec<u8>, Option<RemoteFault>)>,
    /// Bytes that the sink has already.
    skip: u64,
    /// Limit of the bytes to receive.
    room: u64,
}

impl<'a> Feed<'a> {
    pub(super) fn new(
        secrets: &'a Secrets,
        object: &'a Object,
        about: &'a About,
        kind: Kind,
        sink: &'a mut dyn Sink,
    ) -> Feed<'a> {
        Feed { secrets, object, about, kind, sink, head: None, skip: 0, room: 0 }
    }

    /// Requests the missing bytes.
    pub(super) async fn ask(self) -> Result<Came, Failure> {
        let (object, offset) = (self.object, self.sink.have());
        match &object.place {
            Place::Http(http) => self.of_http(http, offset).await,
            Place::Store { store, path, version } => {
                let options = GetOptions { version: version.clone(), ..GetOptions::default() };
                self.of_store(store.as_ref(), path, options, offset).await
            }
        }
    }

    async fn of_http(mut self, http: &Http, offset: u64) -> Result<Came, Failure> {
        let (address, secrets) = (&self.object.address, self.secrets);
        let asked = if offset > 0 { Asked::From(offset) } else { Asked::Whole };
        let mut answer = http.ask(address, asked, secrets).await?;
        let wrong = self.wrong(answer.total, answer.etag.as_deref(), answer.modified.as_deref());
        self.begin(answer.start, offset, wrong)?;
        let mut decoder = answer.gzip.then(gzip);
        loop {
            let piece = answer.response.chunk().await;
            let piece = piece.map_err(|error| secrets.failure(error, address))?;
            let Some(piece) = piece else { break };
            if decoder.is_some() {
                self.push(&unpacked(&mut decoder, &piece)?)?;
            } else {
                self.push(&piece)?;
            }
        }
        if let Some(decoder) = &mut decoder {
            decoder.try_finish().map_err(|error| Failure::Passing(error.into(), None))?;
            let last = std::mem::take(decoder.get_mut());
            self.push(&last)?;
        }
        self.end()?;
        let piece = answer.end.is_some_and(|end| end == self.sink.have() && end < self.about.bytes);
        Ok(if piece { Came::Piece } else { Came::All })
    }

    async fn of_store(
        mut self,
        store: &dyn ObjectStore,
        path: &ObjectPath,
        options: GetOptions,
        offset: u64,
    ) -> Result<Came, Failure> {
        let (secrets, object) = (self.secrets, self.object);
        let failure = |error| secrets.store_failure(error, object);
        let range = (offset > 0).then_some(GetRange::Offset(offset));
        // A weak one is never equal to anything where it is compared so.
        let strong = self.about.etag.clone().filter(|etag| !etag.starts_with("W/"));
        let options = GetOptions { range, if_match: strong, ..options };
        let found = match store.get_opts(path, options).await {
            // A server without ranges answers with the whole object.
            Err(StoreError::NotSupported { .. }) if offset > 0 => return Err(Failure::NoRanges),
            found => found.map_err(failure)?,
        };
        let wrong = self.wrong(Some(found.meta.size), found.meta.e_tag.as_deref(), None);
        let mut pieces = found.into_stream();
        self.begin(offset, offset, wrong)?;
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(failure)?;
            self.push(&piece)?;
        }
        self.end()?;
        Ok(Came::All)
    }

    /// Checks the head of a response.
    fn wrong(
        &self,
        total: Option<u64>,
        etag: Option<&str>,
        modified: Option<&str>,
    ) -> Option<RemoteFault> {
        if self.kind == Kind::Small {
            return None;
        }
        match total {
            Some(total) if self.kind == Kind::Shard && total != self.about.bytes => {
                Some(self.about.size_fault(total))
            }
            _ => self.about.differs(etag, modified).then_some(RemoteFault::Replaced),
        }
    }

    /// Bytes come from `start` on, where those from `offset` on were asked for.
    fn begin(
        &mut self,
        start: u64,
        offset: u64,
        wrong: Option<RemoteFault>,
    ) -> Result<(), Failure> {
        self.skip = match offset.checked_sub(start) {
            // All of it again, and nothing says that it is the same object.
            Some(before) if before > 0 && start == 0 && !self.about.is_known() => {
                self.sink.restart()?;
                0
            }
            Some(before) => before,
            None => return Err(Failure::NoRanges),
        };
        self.room = self.about.bytes.saturating_sub(start);
        match wrong {
            // It can still be a page: that is told first.
            wrong if start == 0 => self.head = Some((Vec::new(), wrong)),
            Some(wrong) => return Err(Failure::Final(wrong)),
            None => {}
        }
        Ok(())
    }

    fn push(&mut self, piece: &[u8]) -> Result<(), Failure> {
        let Some((head, _)) = &mut self.head else { return self.pass(piece) };
        head.extend_from_slice(piece);
        if head.len() < http::BLOCK { Ok(()) } else { self.judge() }
    }

    /// Checks the object's first bytes.
    fn judge(&mut self) -> Result<(), Failure> {
        let Some((head, wrong)) = self.head.take() else { return Ok(()) };
        if self.kind != Kind::Small
            && let Some(page) = self.secrets.page(&head, &self.object.address)
        {
            return Err(Failure::Final(page));
        }
        match wrong {
            Some(wrong) => Err(Failure::Final(wrong)),
            None => self.pass(&head),
        }
    }

    fn pass(&mut self, piece: &[u8]) -> Result<(), Failure> {
        if piece.len() as u64 > self.room {
            // A server that sends more than it said is as wrong as one that sends less.
            let more = self.about.bytes.saturating_add(piece.len() as u64 - self.room);
            return Err(Failure::Final(self.about.size_fault(more)));
        }
        self.room -= piece.len() as u64;
        let skipped = self.skip.min(piece.len() as u64);
        self.skip -= skipped;
        self.sink.again(skipped);
        self.sink.take(&piece[skipped as usize..])?;
        Ok(())
    }

    fn end(&mut self) -> Result<(), Failure> {
        self.judge()
    }
}

pub(super) fn gzip() -> MultiGzDecoder<Vec<u8>> {
    MultiGzDecoder::new(Vec::new())
}

/// A piece of a response, decompressed if necessary.
pub(super) fn unpacked(
    decoder: &mut Option<MultiGzDecoder<Vec<u8>>>,
    piece: &[u8],
) -> Result<Vec<u8>, Failure> {
    let Some(decoder) = decoder else { return Ok(piece.to_vec()) };
    decoder.write_all(piece).map_err(|error| Failure::Passing(error.into(), None))?;
    Ok(std::mem::take(decoder.get_mut()))
}

/// A sink that keeps a small object in memory.
pub(super) struct Small {
    pub(super) bytes: Vec<u8>,
    pub(super) limit: u64,
    pub(super) begins: fn(&[u8]) -> bool,
}

impl Sink for Small {
    fn have(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn restart(&mut self) -> Result<(), ShardError> {
        self.bytes.clear();
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), ShardError> {
        self.bytes.extend_from_slice(piece);
        // Whoever keeps it says why it is not read on.
        match self.is_other() || self.bytes.len() as u64 > self.limit {
            true => Err(ShardError::remote("", RemoteFault::Closed)),
            false => Ok(()),
        }
    }
}

impl Small {
    /// Whether it has enough bytes to tell that the object is something else.
    pub(super) fn is_other(&self) -> bool {
        self.bytes.len() >= http::BLOCK && !(self.begins)(&self.bytes)
    }
}

/// A sink that only counts.
pub(super) struct Measured {
    pub(super) bytes: u64,
    pub(super) digest: Sha256,
}

impl Sink for Measured {
    fn have(&self) -> u64 {
        self.bytes
    }

    fn restart(&mut self) -> Result<(), ShardError> {
        (self.bytes, self.digest) = (0, Sha256::new());
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), ShardError> {
        self.digest.update(piece);
        self.bytes += piece.len() as u64;
        Ok(())
    }
}
