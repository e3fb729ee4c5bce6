//! Last phase, also the way out of every earlier one: a page that says what happened, what to try and the request id.

use std::num::NonZeroU32;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, LOCATION, RETRY_AFTER};
use hyper::{HeaderMap, Response, StatusCode};

use crate::body::OutBody;
use crate::codes;
use crate::timing::{Wait, Waited};

/// A request that gets no answer from an app, with its reason.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub status: StatusCode,
    /// one of Fly Proxy's error codes; empty where none fits
    pub code: &'static str,
    pub happened: String,
    pub advice: &'static str,
    pub app: String,
    pub machine: String,
    pub retry_after_s: Option<NonZeroU32>,
    /// nothing more can be read from this connection
    pub close: bool,
    /// none: it did not
    pub waited: Option<Box<Waited>>,
}

impl Refusal {
    /// `advice` is for those without a code: with one, the table's word holds.
    pub fn new(status: StatusCode, code: &'static str, happened: impl Into<String>, advice: &'static str) -> Refusal {
        Refusal {
            status,
            code,
            happened: happened.into(),
            advice: codes::find(code).map_or(advice, |code| code.advice),
            app: String::new(),
            machine: String::new(),
            retry_after_s: None,
            close: false,
            waited: None,
        }
    }

    pub fn with_code(self, code: &'static str) -> Refusal {
        Refusal {
            code,
            advice: codes::find(code).map_or(self.advice, |code| code.advice),
            ..self
        }
    }

    pub fn malformed(happened: impl Into<String>) -> Refusal {
        let advice = "Correct the request; it was not passed on.";
        Refusal {
            close: true,
            ..Refusal::new(StatusCode::BAD_REQUEST, "", happened, advice)
        }
    }

    pub fn after(self, waited: Waited) -> Refusal {
        Refusal {
            waited: waited.any().then(|| Box::new(waited)),
            ..self
        }
    }

    /// For the app's log. `what` waited: the request, or the connection.
    pub fn line(&self, what: &str) -> String {
        let waited = self.waited.as_ref().map(|waited| format!(" {}", waited.sentence(what)));
        let waited = waited.unwrap_or_default();
        // The owner of the app reads it.
        let todo = match self.advice.split_once("If you run this app: ") {
            Some((_, todo)) => format!("To do: {todo}"),
            None => self.advice.to_owned(),
        };
        format!("{}{waited} {todo}", self.happened)
    }

    pub fn retry_after(self, seconds: u32) -> Refusal {
        Refusal {
            retry_after_s: NonZeroU32::new(seconds),
            ..self
        }
    }

    pub fn of_app(self, app: &str) -> Refusal {
        Refusal {
            app: app.to_owned(),
            ..self
        }
    }

    pub fn of_machine(self, machine: &str) -> Refusal {
        Refusal {
            machine: machine.to_owned(),
            ..self
        }
    }
}

pub fn page(refusal: &Refusal, request_id: &str, accept: Accept) -> Response<OutBody> {
    let status = refusal.status;
    let (content_type, text) = match accept {
        Accept::Json => ("application/json", json(refusal, request_id)),
        Accept::Html => ("text/html; charset=utf-8", html(refusal, request_id)),
        Accept::Plain => ("text/plain; charset=utf-8", plain(refusal, request_id)),
    };
    let mut response = Response::new(OutBody::Full(Full::new(Bytes::from(text))));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = refusal.retry_after_s {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds.get()));
    }
    if refusal.close {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(waited) = &refusal.waited {
        response.extensions_mut().insert(Wait {
            waited: **waited,
            app: refusal.app.clone(),
            machine: refusal.machine.clone(),
            told: true,
        });
    }
    response
}

pub fn redirect(location: &str) -> Result<Response<OutBody>, Refusal> {
    let location =
        HeaderValue::from_str(location).map_err(|_| Refusal::malformed("The address cannot be redirected."))?;
    let mut response = Response::new(OutBody::Full(Full::new(Bytes::new())));
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(LOCATION, location);
    Ok(response)
}

/// 200, and nothing that a cache may keep.
pub fn text(body: &str) -> Response<OutBody> {
    let mut response = Response::new(OutBody::Full(Full::new(Bytes::copy_from_slice(body.as_bytes()))));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A page may say so; what an app says ends with the app's own connection.
pub fn asks_to_close(response: &Response<OutBody>) -> bool {
    matches!(response.body(), OutBody::Full(_)) && crate::request::lists(response.headers(), "close")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    Html,
    Json,
    Plain,
}

impl Accept {
    pub fn of(headers: &HeaderMap) -> Accept {
        let accept = headers.get(ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if accept.contains("text/html") {
            Accept::Html
        } else if accept.contains("json") {
            Accept::Json
        } else {
            Accept::Plain
        }
    }
}

fn title(refusal: &Refusal) -> String {
    format!(
        "{} {}",
        refusal.status.as_u16(),
        refusal.status.canonical_reason().unwrap_or("Error")
    )
}

fn json(refusal: &Refusal, request_id: &str) -> String {
    serde_json::json!({
        "error": refusal.happened,
        "hint": refusal.advice,
        "code": refusal.code,
        "meaning": codes::find(refusal.code).map(|code| code.meaning),
        "request_id": request_id,
    })
    .to_string()
}

fn plain(refusal: &Refusal, request_id: &str) -> String {
    let code = if refusal.code.is_empty() {
        String::new()
    } else {
        format!(" [{}]", refusal.code)
    };
    format!(
        "{}{code}\n{}\n{}\nrequest id: {request_id}\n",
        title(refusal),
        refusal.happened,
        refusal.advice
    )
}

fn html(refusal: &Refusal, request_id: &str) -> String {
    let code = if refusal.code.is_empty() {
        String::new()
    } else {
        format!(" · {}", refusal.code)
    };
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{title}\
         </title><style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem}}\
         small{{color:#666}}</style><h1>{title}</h1><p>{happened}<p>{advice}<p><small>{request_id}{code}</small></html>\n",
        title = title(refusal),
        happened = escape(&refusal.happened),
        advice = escape(refusal.advice),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_does_not_carry_markup_of_others() {
        let refusal = Refusal::new(StatusCode::NOT_FOUND, "", "No app is at <script>.", "Look again.");
        let text = html(&refusal, "01J-iad");
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script>") && text.contains("01J-iad"));
    }

    #[test]
    fn the_form_follows_accept() {
        let of = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            Accept::of(&headers)
        };
        assert_eq!(of("text/html,application/json"), Accept::Html);
        assert_eq!(of("application/json"), Accept::Json);
        assert_eq!(of("*/*"), Accept::Plain);
        assert_eq!(Accept::of(&HeaderMap::new()), Accept::Plain);
    }
}
