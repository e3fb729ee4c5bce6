//! The `Date` of answers whose app said none, for HTTP/2; hyper does the same for HTTP/1.

use std::cell::RefCell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;

thread_local! {
    /// The second that was written last, and how.
    static WRITTEN: RefCell<(u64, HeaderValue)> = const { RefCell::new((0, HeaderValue::from_static(""))) };
}

pub fn now() -> HeaderValue {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    at(since.map_or(0, |since| since.as_secs()))
}

/// Written once a second.
fn at(second: u64) -> HeaderValue {
    WRITTEN.with_borrow_mut(|(written, value)| {
        if *written != second || value.is_empty() {
            let text = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(second));
            if let Ok(new) = HeaderValue::try_from(text) {
                (*written, *value) = (second, new);
            }
        }
        value.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_is_written_as_http_says_it() {
        assert_eq!(at(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT"); // the example of RFC 9110, 5.6.7
        assert_eq!(at(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(at(784_111_778), "Sun, 06 Nov 1994 08:49:38 GMT");
    }
}
