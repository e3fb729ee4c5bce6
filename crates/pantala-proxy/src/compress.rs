//! Last phase, for ports with `compress`: an answer that nobody has encoded yet is, in the best way that the client takes.
//! Nothing is held back: what the app has written so far goes out whenever it pauses.

use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll};

use brotli::CompressorWriter;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use hyper::body::{Body, Frame};
use hyper::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    HeaderName, HeaderValue, VARY,
};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Response, StatusCode};
use pantala_wire::feed::HTTPOptions;

use crate::body::{BodyError, OutBody};

/// Below it the framing eats what is won.
const BYTES_MIN: u64 = 512;
/// What is put out at once.
const BLOCK: usize = 16 * 1024;
/// Of each encoder's memory; browsers refuse windows above 8 MiB.
const WINDOW_LOG: u32 = 18;
const ZSTD_LEVEL: i32 = 3;
const BROTLI_QUALITY: u32 = 4;
const DEFLATE_LEVEL: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    Zstd,
    Brotli,
    Gzip,
    Deflate,
}

/// In the order of preference among those that a client likes alike.
const CODINGS: [(Coding, &str); 4] = [
    (Coding::Zstd, "zstd"),
    (Coding::Brotli, "br"),
    (Coding::Gzip, "gzip"),
    (Coding::Deflate, "deflate"),
];

/// What a request says about the form of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    coding: Option<Coding>,
    bodiless: bool,
}

/// None where the port does not compress: most requests pass here.
pub fn wanted(options: &HTTPOptions, parts: &Parts) -> Option<Wanted> {
    (options.compress == Some(true)).then(|| said(parts))
}

pub fn said(parts: &Parts) -> Wanted {
    Wanted {
        coding: coding(&parts.headers),
        bodiless: parts.method == Method::HEAD,
    }
}

fn coding(headers: &HeaderMap) -> Option<Coding> {
    let values = headers
        .get_all(ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let said: Vec<(&str, f32)> = values.flat_map(|value| value.split(',')).filter_map(weighed).collect();
    let named = |word: &str| {
        said.iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(word))
            .map(|(_, q)| *q)
    };
    let any = named("*");
    let plain = named("identity").unwrap_or(0.0);
    let weight = |word: &str| match (word, named(word)) {
        ("gzip", None) => named("x-gzip").or(any).unwrap_or(0.0),
        (_, known) => known.or(any).unwrap_or(0.0),
    };
    let mut best: Option<(Coding, f32)> = None;
    for (coding, word) in CODINGS {
        let q = weight(word);
        if q > 0.0 && q >= plain && best.is_none_or(|(_, most)| q > most) {
            best = Some((coding, q));
        }
    }
    best.map(|(coding, _)| coding)
}

/// `gzip;q=0.5`
fn weighed(part: &str) -> Option<(&str, f32)> {
    let mut pieces = part.split(';').map(str::trim);
    let name = pieces.next().filter(|name| !name.is_empty())?;
    let q = pieces.find_map(|piece| piece.strip_prefix("q=").or_else(|| piece.strip_prefix("Q=")));
    Some((name, q.map_or(Ok(1.0), str::parse).unwrap_or(0.0)))
}

pub fn compress(response: Response<OutBody>, wanted: Wanted) -> Response<OutBody> {
    let (mut parts, body) = response.into_parts();
    let headers = &mut parts.headers;
    if let Some(encoding) = headers.get(CONTENT_ENCODING) {
        // An app that says so does not want its stream touched; the word itself means nothing to clients.
        if encoding.as_bytes().eq_ignore_ascii_case(b"none") {
            headers.remove(CONTENT_ENCODING);
        }
        return Response::from_parts(parts, body);
    }
    if wanted.bodiless
        || !matches!(body, OutBody::Upstream(_) | OutBody::Object(_))
        || !whole(parts.status, headers)
        || !gains(headers)
    {
        return Response::from_parts(parts, body);
    }
    // Whoever caches it must know, whatever this client takes.
    headers.append(VARY, HeaderValue::from_static("Accept-Encoding"));
    let Some((coding, word)) = CODINGS.into_iter().find(|(coding, _)| wanted.coding == Some(*coding)) else {
        return Response::from_parts(parts, body);
    };
    let Ok(encoder) = Encoder::new(coding, length(headers)) else {
        return Response::from_parts(parts, body);
    };
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static(word));
    headers.remove(CONTENT_LENGTH);
    headers.remove(ACCEPT_RANGES); // of other bytes
    weaken(headers);
    let compressed = Compressed {
        inner: body,
        encoder: Some(encoder),
        unflushed: false,
        paused: false,
        trailers: None,
    };
    Response::from_parts(parts, OutBody::Compressed(Box::new(compressed)))
}

fn whole(status: StatusCode, headers: &HeaderMap) -> bool {
    let empty = [
        StatusCode::NO_CONTENT,
        StatusCode::NOT_MODIFIED,
        StatusCode::PARTIAL_CONTENT,
    ];
    let says = |name: HeaderName, word: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.is_some_and(|value| value.to_ascii_lowercase().contains(word))
    };
    !status.is_informational()
        && !empty.contains(&status)
        && !headers.contains_key(CONTENT_RANGE)
        && !says(CACHE_CONTROL, "no-transform")
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Text of some kind, and enough of it.
fn gains(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
    let essence = essence.trim().to_ascii_lowercase();
    const OTHERS: [&str; 14] = [
        "application/json",
        "application/javascript",
        "application/x-javascript",
        "application/ecmascript",
        "application/xml",
        "application/wasm",
        "application/x-ndjson",
        "application/manifest",
        "application/graphql-response",
        "application/vnd.ms-fontobject",
        "font/ttf",
        "font/otf",
        "image/bmp",
        "image/x-icon",
    ];
    let text = match essence.as_str() {
        "text/event-stream" => false,
        other => {
            let suffix = other.rsplit_once('+').map_or("", |(_, suffix)| suffix);
            other.starts_with("text/") || OTHERS.contains(&other) || matches!(suffix, "json" | "xml" | "text" | "yaml")
        }
    };
    text && length(headers).is_none_or(|bytes| bytes >= BYTES_MIN)
}

/// The same content, not the same bytes.
fn weaken(headers: &mut HeaderMap) {
    let strong = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""));
    let weak = strong.and_then(|tag| HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()).ok());
    if let Some(weak) = weak {
        headers.insert(ETAG, weak);
    }
}

// -- the body -------------------------------------------------------------------------------------------------------

enum Encoder {
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
    Brotli(Box<CompressorWriter<Vec<u8>>>),
    Gzip(GzEncoder<Vec<u8>>),
    Deflate(ZlibEncoder<Vec<u8>>),
}

impl Encoder {
    fn new(coding: Coding, length: Option<u64>) -> io::Result<Encoder> {
        let out = Vec::with_capacity(BLOCK);
        Ok(match coding {
            Coding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
                encoder.window_log(WINDOW_LOG)?;
                // With it the encoder's memory is that of what is to come.
                encoder.set_pledged_src_size(length)?;
                Encoder::Zstd(encoder)
            }
            Coding::Brotli => Encoder::Brotli(Box::new(CompressorWriter::new(out, BLOCK, BROTLI_QUALITY, WINDOW_LOG))),
            Coding::Gzip => Encoder::Gzip(GzEncoder::new(out, Compression::new(DEFLATE_LEVEL))),
            Coding::Deflate => Encoder::Deflate(ZlibEncoder::new(out, Compression::new(DEFLATE_LEVEL))),
        })
    }

    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Encoder::Zstd(encoder) => encoder,
            Encoder::Brotli(encoder) => encoder,
            Encoder::Gzip(encoder) => encoder,
            Encoder::Deflate(encoder) => encoder,
        }
    }

    fn out(&mut self) -> &mut Vec<u8> {
        match self {
            Encoder::Zstd(encoder) => encoder.get_mut(),
            Encoder::Brotli(encoder) => encoder.get_mut(),
            Encoder::Gzip(encoder) => encoder.get_mut(),
            Encoder::Deflate(encoder) => encoder.get_mut(),
        }
    }

    fn take(&mut self) -> Bytes {
        let out = std::mem::replace(self.out(), Vec::with_capacity(BLOCK));
        Bytes::from(out)
    }

    fn finish(self) -> io::Result<Bytes> {
        let out = match self {
            Encoder::Zstd(encoder) => encoder.finish(),
            Encoder::Brotli(encoder) => Ok(encoder.into_inner()),
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Deflate(encoder) => encoder.finish(),
        };
        out.map(Bytes::from)
    }
}

pub struct Compressed {
    inner: OutBody,
    /// none once it is finished
    encoder: Option<Encoder>,
    /// the encoder may hold bytes back
    unflushed: bool,
    /// nothing came in the turn before
    paused: bool,
    trailers: Option<HeaderMap>,
}

impl Compressed {
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let Some(encoder) = &mut self.encoder else {
                return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
            };
            match Pin::new(&mut self.inner).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        (self.unflushed, self.paused) = (true, false);
                        if let Err(error) = encoder.writer().write_all(&data) {
                            return Poll::Ready(Some(Err(error.into())));
                        }
                        if encoder.out().len() >= BLOCK {
                            return Poll::Ready(Some(Ok(Frame::data(encoder.take()))));
                        }
                    }
                    Err(other) => self.trailers = other.into_trailers().ok(),
                },
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(self.finish()),
                Poll::Pending if !self.unflushed => return Poll::Pending,
                Poll::Pending if !self.paused => {
                    // More may be under way already: one turn for the connection to the app to bring it.
                    self.paused = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Pending => {
                    self.unflushed = false;
                    let flushed = encoder.writer().flush();
                    return Poll::Ready(Some(match flushed {
                        Ok(()) => Ok(Frame::data(encoder.take())),
                        Err(error) => Err(error.into()),
                    }));
                }
            }
        }
    }

    fn finish(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        let finished = self.encoder.take()?.finish();
        Some(finished.map(Frame::data).map_err(Into::into))
    }

    pub fn is_end_stream(&self) -> bool {
        self.encoder.is_none() && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        });
        pairs.collect()
    }

    #[test]
    fn the_client_s_weights_before_our_preference() {
        for (accept, chosen) in [
            ("gzip, deflate, br, zstd", Some(Coding::Zstd)),
            ("gzip, deflate, br", Some(Coding::Brotli)),
            ("deflate, gzip", Some(Coding::Gzip)),
            ("deflate", Some(Coding::Deflate)),
            ("x-gzip", Some(Coding::Gzip)),
            ("zstd;q=0.5, gzip;q=0.9", Some(Coding::Gzip)),
            ("zstd;q=0, br;q=0, *", Some(Coding::Gzip)),
            ("*;q=0.1", Some(Coding::Zstd)),
            ("gzip;q=0.5, identity", None),
            ("gzip;q=0", None),
            ("gzip;q=x", None),
            ("identity", None),
            ("*;q=0", None),
            ("snappy", None),
            ("", None),
            ("GZIP ; Q=0.3", Some(Coding::Gzip)),
        ] {
            assert_eq!(coding(&headers(&[("accept-encoding", accept)])), chosen, "{accept}");
        }
        assert_eq!(coding(&HeaderMap::new()), None);
    }

    #[test]
    fn text_of_some_length() {
        for (content_type, length, gain) in [
            ("text/html; charset=utf-8", "512", true),
            ("text/html", "511", false),
            ("text/event-stream", "9999", false),
            ("application/problem+json", "9999", true),
            ("image/svg+xml", "9999", true),
            ("application/grpc", "9999", false),
            ("application/grpc+proto", "9999", false),
            ("image/png", "9999", false),
            ("video/mp4", "9999", false),
            ("application/octet-stream", "9999", false),
        ] {
            let found = gains(&headers(&[("content-type", content_type), ("content-length", length)]));
            assert_eq!(found, gain, "{content_type} {length}");
        }
        assert!(gains(&headers(&[("content-type", "text/css")])), "a stream");
        assert!(!gains(&HeaderMap::new()));
    }

    #[test]
    fn what_is_not_whole_is_left_alone() {
        let none = HeaderMap::new();
        assert!(whole(StatusCode::OK, &none) && whole(StatusCode::NOT_FOUND, &none));
        for status in [204, 206, 304] {
            assert!(!whole(StatusCode::from_u16(status).unwrap(), &none), "{status}");
        }
        assert!(!whole(
            StatusCode::OK,
            &headers(&[("cache-control", "public, no-transform")])
        ));
    }

    #[test]
    fn a_flush_lets_out_all_that_was_written() {
        let (first, second) = (b"<p>one</p>".repeat(300), b"<p>two</p>".repeat(300));
        for (coding, _) in CODINGS {
            let mut encoder = Encoder::new(coding, None).unwrap();
            encoder.writer().write_all(&first).unwrap();
            encoder.writer().flush().unwrap();
            let mut sent = encoder.take().to_vec();
            assert_eq!(read(coding, &sent), first, "{coding:?}");
            encoder.writer().write_all(&second).unwrap();
            sent.extend(encoder.finish().unwrap());
            assert_eq!(read(coding, &sent), [&first[..], &second[..]].concat(), "{coding:?}");
        }
    }

    /// As far as it can be read: a stream that was only flushed has no end yet.
    fn read(coding: Coding, mut sent: &[u8]) -> Vec<u8> {
        let mut decoder: Box<dyn io::Read> = match coding {
            Coding::Zstd => Box::new(zstd::stream::read::Decoder::new(&mut sent).unwrap()),
            Coding::Brotli => Box::new(brotli::Decompressor::new(&mut sent, BLOCK)),
            Coding::Gzip => Box::new(flate2::read::GzDecoder::new(&mut sent)),
            Coding::Deflate => Box::new(flate2::read::ZlibDecoder::new(&mut sent)),
        };
        let (mut text, mut buffer) = (Vec::new(), [0; 256]);
        while let Ok(n) = decoder.read(&mut buffer)
            && n > 0
        {
            text.extend_from_slice(&buffer[..n]);
        }
        text
    }

    #[test]
    fn tags_become_weak() {
        for (tag, weak) in [("\"a\"", "W/\"a\""), ("W/\"a\"", "W/\"a\"")] {
            let mut map = headers(&[("etag", tag)]);
            weaken(&mut map);
            assert_eq!(map.get(ETAG).unwrap(), weak);
        }
    }
}
