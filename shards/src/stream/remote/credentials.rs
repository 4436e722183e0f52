//! Who asks: the `Authorization` header of requests over HTTP, from the URL, variables or `.netrc`.
//!
//! The first that applies is sent:
//! 1. user and password in the URL;
//! 2. nothing, where the URL itself is signed: stores refuse two proofs at once;
//! 3. `DETCO_HTTP_AUTHORIZATION` (the whole header) or `DETCO_HTTP_TOKEN` (`Bearer …`), to every host
//!    that the data names, or only to those listed in `DETCO_HTTP_HOSTS`;
//! 4. `HF_TOKEN`, to Hugging Face over TLS, and to the host of `HF_ENDPOINT`;
//! 5. what `.netrc` (`NETRC`, or in the home folder) has for the host.
//!
//! None of it follows a redirect to another host.

use std::fmt;
use std::path::PathBuf;

use reqwest::RequestBuilder;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use url::Url;

use super::address::Address;

/// A host and its port.
type HostPort = (String, Option<u16>);

/// What requests are authorized with.
#[derive(Default)]
pub(super) struct Credentials {
    /// The whole header, and the hosts that it is for; none means all.
    header: Option<(HeaderValue, Vec<String>)>,
    /// Hugging Face's, and another host than its own.
    hub: Option<(HeaderValue, Option<HostPort>)>,
    logins: Vec<Login>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// An entry of `.netrc`.
#[derive(Clone, Default, PartialEq, Eq)]
struct Login {
    /// `None` for the `default` entry.
    machine: Option<String>,
    user: String,
    password: String,
}

impl Credentials {
    /// From variables, and the `.netrc` that they lead to.
    ///
    /// # Errors
    ///
    /// A variable that no header can hold, or a `NETRC` that cannot be read.
    pub(super) fn new(environment: &[(String, String)]) -> Result<Credentials, String> {
        let variable = |name: &str| {
            let found = environment.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.trim()).filter(|value| !value.is_empty())
        };
        let header = |name: &str, value: String| {
            let mut value = HeaderValue::from_str(&value)
                .map_err(|_| format!("{name} holds a character that no header can hold"))?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        let whole = match (variable("DETCO_HTTP_AUTHORIZATION"), variable("DETCO_HTTP_TOKEN")) {
            (Some(whole), _) => Some(header("DETCO_HTTP_AUTHORIZATION", whole.to_owned())?),
            (None, Some(token)) => Some(header("DETCO_HTTP_TOKEN", format!("Bearer {token}"))?),
            (None, None) => None,
        };
        let hosts = variable("DETCO_HTTP_HOSTS").unwrap_or("");
        let hosts = hosts.split([',', ' ']).filter(|host| !host.is_empty());
        let hosts: Vec<String> = hosts.map(str::to_ascii_lowercase).collect();
        let hub = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
        let hub = hub.map(|token| header("HF_TOKEN", format!("Bearer {token}"))).transpose()?;
        let endpoint = variable("HF_ENDPOINT").and_then(|text| Url::parse(text).ok());
        let endpoint = endpoint
            .and_then(|url| Some((url.host_str()?.to_owned(), url.port_or_known_default())));
        let logins = match (variable("NETRC"), variable("HOME")) {
            (Some(file), _) => std::fs::read_to_string(file)
                .map(|text| netrc(&text))
                .map_err(|error| format!("cannot read NETRC={file}: {error}"))?,
            // One that lies there and cannot be read is nobody's order to use it.
            (None, Some(home)) => std::fs::read_to_string(PathBuf::from(home).join(".netrc"))
                .map(|text| netrc(&text))
                .unwrap_or_default(),
            (None, None) => Vec::new(),
        };
        let (header, hub) = (whole.map(|header| (header, hosts)), hub.map(|hub| (hub, endpoint)));
        Ok(Credentials { header, hub, logins })
    }

    /// Adds to a request what the address is authorized with.
    pub(super) fn apply(&self, request: RequestBuilder, address: &Address) -> RequestBuilder {
        if let Some((user, password)) = address.login() {
            return request.basic_auth(user, Some(password));
        }
        if address.is_signed() {
            return request;
        }
        let url = address.url();
        let host = url.host_str().unwrap_or("");
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or(0));
        if let Some((header, hosts)) = &self.header
            && (hosts.is_empty() || hosts.iter().any(|one| *one == host || *one == with_port))
        {
            return request.header(AUTHORIZATION, header);
        }
        if let Some((header, endpoint)) = &self.hub {
            let of = |(host, port): &(String, Option<u16>)| {
                url.host_str() == Some(host) && url.port_or_known_default() == *port
            };
            if is_hub(url) || endpoint.as_ref().is_some_and(of) {
                return request.header(AUTHORIZATION, header);
            }
        }
        let for_host = |login: &&Login| login.machine.as_deref().is_none_or(|one| one == host);
        match self.logins.iter().find(for_host) {
            Some(login) => request.basic_auth(&login.user, Some(&login.password)),
            None => request,
        }
    }

    /// What no message may hold.
    pub(super) fn secrets(&self) -> impl Iterator<Item = String> {
        self.logins.iter().map(|login| login.password.clone())
    }
}

/// Whether a URL leads to Hugging Face over an encrypted connection.
pub(super) fn is_hub(url: &Url) -> bool {
    let host = url.host_str().unwrap_or("");
    let of = |domain: &str| {
        host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    url.scheme() == "https" && (of("huggingface.co") || of("hf.co"))
}

/// The logins of a `.netrc`, whose words are separated by any space; `macdef` runs to an empty line.
fn netrc(text: &str) -> Vec<Login> {
    let mut logins: Vec<Login> = Vec::new();
    let mut macro_runs = false;
    for line in text.lines() {
        if macro_runs || line.trim_start().starts_with('#') {
            macro_runs &= !line.trim().is_empty();
            continue;
        }
        let mut words = words(line).into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_default();
            match (word.as_str(), logins.last_mut()) {
                ("machine", _) => {
                    let machine = Some(value().to_ascii_lowercase());
                    logins.push(Login { machine, ..Login::default() });
                }
                ("default", _) => logins.push(Login::default()),
                ("login", Some(login)) => login.user = value(),
                ("password", Some(login)) => login.password = value(),
                ("account", _) => drop(value()),
                ("macdef", _) => {
                    macro_runs = true;
                    break;
                }
                _ => {}
            }
        }
    }
    logins
}

/// Words of a line; one in double quotes may hold spaces, and `\` takes what follows as it is.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut begun) = (Vec::new(), String::new(), false, false);
    let mut rest = line.chars();
    while let Some(letter) = rest.next() {
        match letter {
            '"' if quoted || !begun => (quoted, begun) = (!quoted, true),
            '\\' if quoted => word.extend(rest.next()),
            letter if letter.is_whitespace() && !quoted => {
                if std::mem::take(&mut begun) {
                    words.push(std::mem::take(&mut word));
                }
            }
            letter => {
                word.push(letter);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header that a URL is asked with.
    fn sent(environment: &[(&str, &str)], url: &str) -> Option<String> {
        let environment: Vec<(String, String)> =
            environment.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address = Address::parse(url).unwrap();
        let request = reqwest::Client::new().get(address.url().clone());
        let built = Credentials::new(&environment).unwrap().apply(request, &address).build();
        let header = built.unwrap().headers().get(AUTHORIZATION).cloned();
        header.map(|header| header.to_str().unwrap().to_owned())
    }

    #[test]
    fn each_host_hears_its_own_secret_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(".netrc");
        std::fs::write(&file, "machine h login me password \"a b\"\n").unwrap();
        let home = ("HOME", folder.path().to_str().unwrap());
        let (token, hf) = (("DETCO_HTTP_TOKEN", "t0ken\n"), ("HF_TOKEN", "hub"));
        let basic = |text: &str| Some(format!("Basic {text}"));
        let bearer = |text: &str| Some(format!("Bearer {text}"));
        for (environment, url, expected) in [
            (&[][..], "https://h/a.tar", None),
            (&[home], "https://h/a.tar", basic("bWU6YSBi")), // me:a b
            (&[home], "https://other/a.tar", None),
            (&[home, token], "https://h/a.tar", bearer("t0ken")),
            (&[token], "https://u:p%40@h/a.tar", basic("dTpwQA==")), // u:p@
            (&[token], "https://h/a.tar?X-Amz-Signature=1", None),
            (&[token, ("DETCO_HTTP_HOSTS", "other, h:8080")], "https://h/a.tar", None),
            (&[token, ("DETCO_HTTP_HOSTS", "other,H:8080")], "http://h:8080/", bearer("t0ken")),
            (&[("DETCO_HTTP_AUTHORIZATION", "Key x"), token], "http://h/", Some("Key x".into())),
            (&[hf], "https://huggingface.co/a.tar", bearer("hub")),
            (&[hf], "https://cdn-lfs.huggingface.co/a.tar", bearer("hub")),
            (&[hf], "https://hf.co/a.tar", bearer("hub")),
            (&[hf], "http://huggingface.co/a.tar", None),
            (&[hf], "https://nothuggingface.co/a.tar", None),
            (&[hf], "https://huggingface.co.example.org/a.tar", None),
            (&[hf, ("HF_ENDPOINT", "http://m:81")], "http://m:81/a.tar", bearer("hub")),
            (&[hf, ("HF_ENDPOINT", "http://m:81")], "http://m:82/a.tar", None),
        ] {
            assert_eq!(sent(environment, url), expected, "{environment:?} {url}");
        }
        let newline = [("DETCO_HTTP_TOKEN".to_owned(), "a\nb".to_owned())];
        let error = Credentials::new(&newline).unwrap_err();
        assert!(error.contains("DETCO_HTTP_TOKEN") && !error.contains("a\nb"), "{error}");
        let missing = [("NETRC".to_owned(), "/nowhere/netrc".to_owned())];
        assert!(Credentials::new(&missing).unwrap_err().contains("/nowhere/netrc"));
    }

    #[test]
    fn netrc_is_read_as_its_writers_mean_it() {
        let text = "# machine commented login no password no\n\
            macdef init\n machine inside login no password no\n\n\
            machine A\n\tlogin one\n\tpassword \"two \\\" three\"\n\
            machine b login x account y password z machine c login w\n\
            default login anonymous password me@h";
        let logins = netrc(text);
        let found: Vec<_> = logins
            .iter()
            .map(|one| (one.machine.as_deref(), one.user.as_str(), one.password.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                (Some("a"), "one", "two \" three"),
                (Some("b"), "x", "z"),
                (Some("c"), "w", ""),
                (None, "anonymous", "me@h"),
            ]
        );
        assert!(netrc("login before password any machine").len() == 1);
    }
}
