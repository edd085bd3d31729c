package message

import (
	"errors"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// The texts that programs written for the package of this name compare.
var (
	errPoolClosed       = errors.New("natspool: 已关闭")
	errNoServers        = errors.New("natspool: 至少需要 1 个服务器地址")
	errSubscriberClosed = errors.New("subscriber: closed")
	errSenderClosed     = &textError{"sender已关闭", presence.ErrClosed}
	errServerBusy       = errors.New("server busy")
	errHandlerPanicked  = errors.New("服务器内部错误")
)

const (
	offlineText     = "客户端已离线: "
	streamErrorText = "流式响应错误: "
	closedText      = "NATS连接已关闭"
	unavailableText = "NATS连接不可用"
	retriesUsedUp   = "流式请求重试失败，最大重试次数=%d, 最后错误: %w"
)

// The payloads that end a stream, which response functions are given as messages.
const (
	endMarker   = "__STREAM_END__"
	errorMarker = "__STREAM_ERROR__:"
)

// textError has the text that programs compare; errors.Is finds the cause, a status of the package presence.
type textError struct {
	text  string
	cause error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.cause }
