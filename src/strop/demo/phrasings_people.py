"""How requests are worded (as `phrasings.py` says): alarms, timers, reminders, calls, messages, music."""

from __future__ import annotations

from strop.demo.intent import Intent

PEOPLE: tuple[Intent, ...] = (
    Intent(
        "set_alarm",
        ("time",),
        """wake me at {time}
        wake me up at {time}
        set an alarm for {time}
        set the alarm to {time}
        set my alarm for {time}
        = alarm at {time}
        = i need an alarm at {time}
        get me up at {time}
        get me out of bed at {time}
        ring the alarm at {time}
        = i have to be awake by {time}
        = i want to get up at {time}
        make an alarm for {time}
        let the alarm ring at {time}
        = the alarm should go off at {time}
        = at {time} wake me up""",
        """put the alarm on for {time}
        = i must be up at {time}
        have the alarm go off at {time}
        = at {time} i need to wake up""",
    ),
    Intent(
        "set_alarm",
        ("time", "days"),
        """wake me at {time} {days}
        wake me up {days} at {time}
        set an alarm for {time} {days}
        set the alarm to {time} {days}
        set my alarm {days} for {time}
        = alarm at {time} {days}
        = i need an alarm {days} at {time}
        get me up at {time} {days}
        get me out of bed {days} at {time}
        ring the alarm at {time} {days}
        = i have to be awake by {time} {days}
        = {days} i want to get up at {time}
        make an alarm {days} for {time}
        let the alarm ring {days} at {time}
        = the alarm should go off {days} at {time}
        = {days} at {time} wake me up""",
        """put the alarm on {days} for {time}
        = i must be up at {time} {days}
        have the alarm go off at {time} {days}
        = {days} i need to wake up at {time}""",
    ),
    Intent(
        "set_timer",
        ("minutes",),
        """set a timer for {minutes}
        start a timer for {minutes}
        set the timer to {minutes}
        start a {minutes} timer
        = timer {minutes}
        = timer for {minutes}
        count down {minutes}
        start a countdown of {minutes}
        = i need a timer for {minutes}
        = i need a timer of {minutes}
        tell me when {minutes} have passed
        let me know when {minutes} are up
        let me know in {minutes}
        beep after {minutes}
        beep in {minutes}
        give me {minutes} on the timer
        put {minutes} on the timer
        run a timer for {minutes}
        make a timer of {minutes}
        begin a countdown for {minutes}
        time {minutes} for me
        = the timer should ring in {minutes}
        = the timer should run for {minutes}
        = {minutes} on the timer""",
        """begin a timer of {minutes}
        run a countdown of {minutes}
        tell me when {minutes} are up
        let the timer run for {minutes}
        = i want a timer for {minutes}
        ring in {minutes}""",
    ),
    Intent(
        "remind",
        ("text", "time"),
        """remind me to {text} at {time}
        remind me at {time} to {text}
        = i need to {text} at {time} remind me
        set a reminder to {text} at {time}
        set a reminder for {time} to {text}
        add a reminder to {text} at {time}
        make a reminder for {time} to {text}
        = reminder at {time} to {text}
        = do not let me forget to {text} at {time}
        = i must not forget to {text} at {time}
        = at {time} remind me to {text}
        = at {time} i should {text} remind me
        tell me at {time} to {text}
        tell me to {text} at {time}
        help me remember to {text} at {time}
        = i want to be reminded to {text} at {time}
        = i want to be reminded at {time} to {text}
        give me a reminder to {text} at {time}
        create a reminder to {text} at {time}
        nudge me at {time} to {text}
        = there should be a reminder at {time} to {text}
        note that i have to {text} at {time}""",
        """create a reminder for {time} to {text}
        = at {time} tell me to {text}
        nudge me to {text} at {time}
        = do not let me forget at {time} to {text}
        give me a reminder at {time} to {text}
        = i would like a reminder to {text} at {time}""",
    ),
    Intent(
        "call",
        ("name",),
        """call {name}
        phone {name}
        ring {name}
        dial {name}
        give {name} a call
        make a call to {name}
        start a call with {name}
        place a call to {name}
        get {name} on the phone
        get me {name} on the line
        call {name} for me
        call {name} on the phone
        ring up {name}
        phone {name} for me
        connect me with {name}
        connect me to {name}
        = i want to talk to {name}
        = i want to call {name}
        = i need to speak to {name}
        = i need to phone {name}
        = i have to call {name}
        put me through to {name}
        dial the number of {name}
        call up {name}""",
        """give {name} a ring
        = i would like to speak to {name}
        = i need to talk to {name}
        ring {name} for me
        put a call through to {name}
        start a phone call with {name}""",
    ),
    Intent(
        "send_message",
        ("name", "text"),
        """send a message to {name} saying {text}
        send {name} a message saying {text}
        send {name} the message {text}
        text {name} that {text}
        text {name} saying {text}
        message {name} that {text}
        message {name} saying {text}
        write to {name} that {text}
        write {name} a message saying {text}
        tell {name} that {text}
        let {name} know that {text}
        send a text to {name} saying {text}
        send a note to {name} that says {text}
        send {name} a text that says {text}
        drop {name} a line saying {text}
        inform {name} that {text}
        = new message to {name} saying {text}
        = message to {name} that says {text}
        = i want to tell {name} that {text}
        = {name} should know that {text}
        give {name} the message {text}
        answer {name} that {text}
        reply to {name} that {text}
        reply to {name} saying {text}""",
        """write a message to {name} saying {text}
        send a message to {name} that says {text}
        answer {name} saying {text}
        = i want to let {name} know that {text}
        drop a note to {name} saying {text}
        send word to {name} that {text}""",
    ),
    Intent(
        "play",
        ("title",),
        """play {title}
        play the song {title}
        play me {title}
        play the track {title}
        put on {title}
        put on the song {title}
        start {title}
        start the song {title}
        start playing {title}
        = i want to hear {title}
        = i want to hear the song {title}
        = i want to listen to {title}
        = i would like to hear {title}
        = i feel like hearing {title}
        let me hear {title}
        let us hear {title}
        listen to {title}
        find the song {title} and play it
        find {title} and play it
        play something called {title}
        = music please play {title}
        play the tune {title}
        = the next song should be {title}
        turn on the song {title}""",
        """put on the track {title}
        let me listen to {title}
        = i would like to listen to {title}
        start the track {title}
        play us the song {title}
        = i feel like listening to {title}""",
    ),
)
