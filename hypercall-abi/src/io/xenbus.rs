//! States by which the two halves of a device meet in xenstore (public/io/xenbus.h).

crate::subops::command_enum! {
    /// The `state` node of a front end or a back end, as decimal text.
    XenbusState, "XenbusState" {
        /// No state.
        Unknown = 0, "Unknown";
        /// Starting.
        Initialising = 1, "Initialising";
        /// Waiting for the peer's nodes.
        InitWait = 2, "InitWait";
        /// Own nodes are there, waiting for the peer to connect.
        Initialised = 3, "Initialised";
        /// At work.
        Connected = 4, "Connected";
        /// Being closed.
        Closing = 5, "Closing";
        /// Closed.
        Closed = 6, "Closed";
        /// Changing its set-up.
        Reconfiguring = 7, "Reconfiguring";
        /// Changed.
        Reconfigured = 8, "Reconfigured";
    }
}

impl XenbusState {
    /// Reads the node's text; anything else than a known number is [`XenbusState::Unknown`].
    #[must_use]
    pub fn from_text(text: &[u8]) -> Self {
        match text {
            &[digit @ b'0'..=b'9'] => Self::from_number(u64::from(digit - b'0')).unwrap_or(Self::Unknown),
            _ => Self::Unknown,
        }
    }

    /// The node's text.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::XenbusState;

    #[test]
    fn text_round_trips() {
        for &state in XenbusState::ALL {
            assert_eq!(XenbusState::from_text(state.text().as_bytes()), state);
        }
        for other in [&b""[..], b"9", b"44", b"x", b" 4"] {
            assert_eq!(XenbusState::from_text(other), XenbusState::Unknown);
        }
    }
}
