//! Secrets, and errors of requests and stores with the secrets removed.

use std::error::Error;

use object_store::Error as StoreError;

use super::address::Address;
use super::credentials::Credentials;
use super::http;
use super::store::{Failure, Object};
use crate::format::{Cause, RemoteFault};

/// The secrets of a process, which no message may contain.
pub(super) struct Secrets(Vec<String>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

/// Shortest secret that is removed: shorter ones occur in ordinary words.
const SECRET_MIN: usize = 4;

impl Secrets {
    pub(super) fn new(environment: &[(String, String)], credentials: &Credentials) -> Secrets {
        let names = ["KEY", "SECRET", "TOKEN", "PASSWORD", "SAS", "AUTHORIZATION", "CREDENTIAL"];
        // Paths to what is secret are none.
        let ours = environment.iter().filter(|(key, value)| {
            !value.starts_with('/') && names.iter().any(|name| key.contains(name))
        });
        // Of `Bearer abc`, each word; of `?sv=1&sig=abc`, each value.
        let words = ours.flat_map(|(_, value)| {
            let parts = value.split([' ', '&', '?', '\n']);
            parts.flat_map(|part| [part, part.split_once('=').map_or("", |(_, value)| value)])
        });
        Secrets(words.map(str::to_owned).chain(credentials.secrets()).collect())
    }

    /// A text with the secrets removed.
    pub(super) fn scrub(&self, text: &str, address: &Address) -> String {
        let own = address.secrets();
        let mut secrets: Vec<&String> =
            self.0.iter().chain(&own).filter(|secret| secret.len() >= SECRET_MIN).collect();
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets.into_iter().fold(text.to_owned(), |text, secret| match text.contains(secret) {
            true => text.replace(secret, "…"),
            false => text,
        })
    }

    /// An error and its causes in one line.
    pub(super) fn cause(&self, error: &(dyn Error + 'static), address: &Address) -> Cause {
        let (mut text, mut next) = (error.to_string(), error.source());
        while let Some(cause) = next {
            let said = cause.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            next = cause.source();
        }
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        self.scrub(&line, address).into()
    }

    /// The failure of a request without a response.
    pub(super) fn failure(&self, error: reqwest::Error, address: &Address) -> Failure {
        // Where a redirect led is a secret as well: stores sign it.
        let error = error.without_url();
        let cause = self.cause(&error, address);
        if error.is_redirect() {
            return Failure::Final(RemoteFault::Refused { answer: cause.to_string() });
        }
        match error.is_builder() {
            true => Failure::Final(RemoteFault::Store(cause)),
            false => Failure::Passing(cause, None),
        }
    }

    /// The failure of a store.
    pub(super) fn store_failure(&self, error: StoreError, object: &Object) -> Failure {
        let cause = self.cause(&error, &object.address);
        let status = match error {
            StoreError::NotFound { .. } => return Failure::Final(RemoteFault::Missing),
            StoreError::PermissionDenied { .. } => 403,
            StoreError::Unauthenticated { .. } => 401,
            StoreError::Precondition { .. } => return Failure::Final(RemoteFault::Replaced),
            StoreError::NotSupported { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::InvalidPath { .. }
            | StoreError::UnknownConfigurationKey { .. } => {
                return Failure::Final(RemoteFault::Store(cause));
            }
            _ => return Failure::Passing(self.without_credentials(cause, object), None),
        };
        let variables = variables(object);
        let advice = format!("credentials come from {variables} variables: {cause}");
        Failure::Final(RemoteFault::Denied { answer: status.to_string(), advice })
    }

    /// Without credentials the machine is asked for those of its role: outside of a cloud it has none, and
    /// what is missing are the variables.
    fn without_credentials(&self, cause: Cause, object: &Object) -> Cause {
        let said = cause.to_string();
        let asked =
            ["/latest/api/token", "/latest/meta-data", "169.254.169.254", "computeMetadata"];
        if !asked.iter().any(|place| said.contains(place)) {
            return cause;
        }
        let public = if matches!(object.address.url().scheme(), "s3" | "s3a") {
            "; public buckets want AWS_SKIP_SIGNATURE=true"
        } else {
            ""
        };
        let variables = variables(object);
        format!("no credentials in {variables} variables{public}; this machine's own role: {said}")
            .into()
    }

    /// A page, as far as it may be shown.
    pub(super) fn page(&self, head: &[u8], address: &Address) -> Option<RemoteFault> {
        http::page(head).map(|fault| match fault {
            RemoteFault::Page { what, begins } => {
                RemoteFault::Page { what, begins: self.scrub(&begins, address) }
            }
            other => other,
        })
    }
}

/// The variables that a store's credentials come from.
fn variables(object: &Object) -> &'static str {
    match object.address.url().scheme() {
        "gs" => "GOOGLE_*",
        "s3" | "s3a" => "AWS_*",
        "https" => "AWS_* or AZURE_*",
        _ => "AZURE_*",
    }
}
